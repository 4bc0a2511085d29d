"""One step of Keras' Adam on the CPU, by the fused loop that PyTorch has for its own Adam.

That loop takes every number once, where the plain operations make several passes and two temporary copies. Its
ε stands elsewhere: beside ``√(v/(1 − β₂ᵗ))``. At a step number at which both corrections are 1 it is beside ``√v``, as
Keras has it, and the corrections go into the rate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from apv_fast.reference.adam import Settings, laid_out, step_size

LATE = 1e9  # a step number at which 1 − βᵗ is 1 for every β that anybody uses


class Step:
    """See :class:`apv_fast.reference.adam.Step`. Gradients are clipped in place."""

    def __init__(self, weights: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        self.weights, self.first, self.second = list(weights), list(first), list(second)
        self._late = [torch.tensor(LATE) for _ in weights]

    def __call__(
        self, gradients: Sequence[Tensor | None], rate: Tensor, iteration: Tensor, settings: Settings
    ) -> Tensor:
        """One step, as the reference describes it."""
        iteration.add_(1)
        torch._foreach_mul_(self.weights, 1 - settings.weight_decay)
        of_weight = zip(self.weights, gradients, self.first, self.second, self._late, strict=True)
        moved = [(w, laid_out(g, w), m, v, late) for w, g, m, v, late in of_weight if g is not None]
        if not moved:
            return self.weights[0].new_zeros(())
        w, g, m, v, late = (list(column) for column in zip(*moved, strict=True))
        norm = torch.nn.utils.get_total_norm(g)
        torch._foreach_mul_(g, (settings.clip / norm).clamp(max=1))
        beta1, beta2 = settings.betas
        torch._fused_adam_(
            w, g, m, v, [], late,
            lr=step_size(rate, iteration, settings), beta1=beta1, beta2=beta2, weight_decay=0.0, eps=settings.eps,
            amsgrad=False, maximize=False,
        )  # fmt: skip
        return norm

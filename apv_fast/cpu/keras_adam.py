"""One step of Keras' Adam in C++, ``csrc/cpu/keras_adam/``: a pass over the gradients, a pass over everything.

Takes float32 or float64 weights, all of one kind, whose memory has no gaps; the reference takes the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from apv_fast import _C
from apv_fast.cpu.parts.call import address, how
from apv_fast.reference.keras_adam import Settings, laid_out, step_size
from apv_fast.reference.keras_adam import Step as PlainStep


@torch.library.custom_op("apv_fast::keras_adam_cpu", mutates_args=("weights", "first", "second"))
def _step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    size: Tensor,
    eps: float,
    clip: float,
    decay: float,
    beta1: float,
    beta2: float,
) -> Tensor:
    """The gradients' norm, after a step of ``size`` (float64 scalar)."""
    norm = _C.keras_adam(
        weights=[address(w) for w in weights],
        gradients=[address(g) for g in gradients],
        first=[address(m) for m in first],
        second=[address(v) for v in second],
        sizes=[w.numel() for w in weights],
        size=size.item(),
        eps=eps,
        clip=clip,
        decay=decay,
        betas=(beta1, beta2),
        **how(weights[0].dtype),
    )
    return weights[0].new_tensor(norm)


class Step:
    """See :class:`apv_fast.reference.keras_adam.Step`."""

    def __init__(self, weights: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        self.weights, self.first, self.second = list(weights), list(first), list(second)
        self._plain = PlainStep(weights, first, second)

    def _ours(self) -> bool:
        kinds = {w.dtype for w in self.weights}
        dense = all(w.stride() == m.stride() for w, m in zip(self.weights, self.first, strict=True))
        return dense and len(kinds) == 1 and kinds <= {torch.float32, torch.float64}

    def __call__(
        self, gradients: Sequence[Tensor | None], rate: Tensor, iteration: Tensor, settings: Settings
    ) -> Tensor:
        """One step, as the reference describes it."""
        if not self._ours():
            return self._plain(gradients, rate, iteration, settings)
        iteration.add_(1)
        of_weight = zip(self.weights, gradients, strict=True)
        in_order = [None if g is None else laid_out(g, w) for w, g in of_weight]
        size = step_size(rate, iteration, settings)
        norm: Tensor = _step(
            self.weights, in_order, self.first, self.second, size,
            settings.eps, settings.clip, settings.weight_decay, *settings.betas,
        )  # fmt: skip
        return norm

"""One step of Keras' Adam in plain PyTorch, clocks and rates on the device; see :mod:`apv_fast.optim`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Settings(NamedTuple):
    """What a run does not change."""

    eps: float
    clip: float
    weight_decay: float
    betas: tuple[float, float]


def step_size(rate: Tensor, iteration: Tensor, settings: Settings) -> Tensor:
    """``lr·√(1 − β₂ᵗ)/(1 − β₁ᵗ)`` of step number ``iteration``; scalar tensors."""
    (beta1, beta2), t = settings.betas, iteration.to(rate.dtype)
    return rate * (1 - beta2**t).sqrt() / (1 - beta1**t)


def laid_out(gradient: Tensor, weight: Tensor) -> Tensor:
    """The gradient, in memory in the order of the weight, which is how autograd leaves it; for loops over memory."""
    if gradient.stride() == weight.stride():
        return gradient
    return torch.empty_like(weight).copy_(gradient)


class Step:
    """Takes steps with some weights and their moments, in place, never waiting for the device.

    Args:
        weights: any shapes.
        first: their first moments.
        second: their second moments.
    """

    def __init__(self, weights: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        self.weights, self.first, self.second = list(weights), list(first), list(second)

    def __call__(
        self, gradients: Sequence[Tensor | None], rate: Tensor, iteration: Tensor, settings: Settings
    ) -> Tensor:
        """One step.

        Args:
            gradients: of the weights; a weight without decays, and its moments stay as they are.
            rate: learning rate, float64 scalar.
            iteration: steps taken before, int64 scalar; is incremented.
            settings: see above.

        Returns:
            The gradients' global norm before the clip, a scalar.
        """
        iteration.add_(1)
        torch._foreach_mul_(self.weights, 1 - settings.weight_decay)
        of_weight = zip(self.weights, gradients, self.first, self.second, strict=True)
        moved = [(w, g, m, v) for w, g, m, v in of_weight if g is not None]
        if not moved:
            return self.weights[0].new_zeros(())
        w, g, m, v = (list(column) for column in zip(*moved, strict=True))
        norm = torch.nn.utils.get_total_norm(g)
        g = list(torch._foreach_mul(g, (settings.clip / norm).clamp(max=1)))
        beta1, beta2 = settings.betas
        torch._foreach_lerp_(m, g, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, g, g, value=1 - beta2)
        size = step_size(rate, iteration, settings)
        divisor = torch._foreach_sqrt(v)
        torch._foreach_add_(divisor, settings.eps)
        torch._foreach_div_(divisor, size.to(norm.dtype))  # a rate of 0 makes it infinite, and the step 0
        torch._foreach_addcdiv_(w, m, divisor, value=-1)
        return norm

"""A running magnitude that rewards and bonuses are divided by (DreamerV2's StreamNorm)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StreamNorm(nn.Module):
    """Divide by a running mean of magnitudes: ``mag ← m·mag + (1 − m)·mean|x|``, then ``scale · x / (mag + eps)``.

    Args:
        momentum: m; 1 turns it off.
        scale: factor of the result.
        eps: keeps the division finite.
    """

    mag: Tensor

    def __init__(self, momentum: float = 0.99, scale: float = 1.0, eps: float = 1e-8) -> None:
        super().__init__()
        self.momentum, self.scale, self.eps = momentum, scale, eps
        self.register_buffer("mag", torch.ones((), dtype=torch.float64))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Update the magnitude with ``x``, of any shape, and return it normalised."""
        # As a row: torch.compile (torch 2.13) takes a float64 scalar on the CPU for a constant, and loses what is
        # written to it.
        self.mag.view(1).mul_(self.momentum).add_((1 - self.momentum) * x.abs().mean().to(self.mag))
        return (self.scale * x / (self.mag + self.eps)).to(x.dtype)

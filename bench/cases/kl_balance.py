"""KL balancing between posterior and prior."""

from __future__ import annotations

import torch
from torch import Tensor

from apv_fast import ops
from bench.registry import OnDevice, Problem, case, differentiable


@case("kl_balance", [{"B": 16, "T": 25, "S": 32, "C": 32}])
@case("kl_balance", [{"B": 50, "T": 50, "S": 32, "C": 32}], device=OnDevice())
def kl_balance(device: torch.device, dtype: torch.dtype, B: int, T: int, S: int, C: int) -> Problem:
    """Categorical latents of full size."""
    leaves = [torch.randn(B, T, S, C, device=device, dtype=dtype).requires_grad_() for _ in range(2)]

    def forward(backend: str) -> list[Tensor]:
        return [ops.kl_balance(*leaves, backend=backend)[0]]

    return differentiable(forward, leaves)


@case("kl_balance_normal", [{"B": 50, "T": 50, "S": 32}], device=OnDevice())
def kl_balance_normal(device: torch.device, dtype: torch.dtype, B: int, T: int, S: int) -> Problem:
    """Gaussian latents."""
    means = [torch.randn(B, T, S, device=device, dtype=dtype).requires_grad_() for _ in range(2)]
    stds = [(0.1 + torch.rand(B, T, S, device=device, dtype=dtype)).requires_grad_() for _ in range(2)]
    leaves = [means[0], stds[0], means[1], stds[1]]

    def forward(backend: str) -> list[Tensor]:
        return [ops.kl_balance_normal(*leaves, backend=backend)[0]]

    return differentiable(forward, leaves)

"""λ-returns of imagined sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from apv_fast import ops
from bench.registry import OnDevice, Problem, case, differentiable


@case("lambda_return", [{"H": 15, "N": 400}])
@case("lambda_return", [{"H": 15, "N": 2500}], device=OnDevice())
def lambda_return(device: torch.device, dtype: torch.dtype, H: int, N: int) -> Problem:
    """B*T = 400 (16 x 25) and 2500 (50 x 50, the paper's Meta-world) start states, the paper's horizon."""
    reward, value = torch.randn(2, H, N, device=device, dtype=dtype)
    discount = torch.rand(H, N, device=device, dtype=dtype)
    bootstrap = torch.randn(N, device=device, dtype=dtype)
    leaves = [tensor.requires_grad_() for tensor in (reward.clone(), value.clone(), discount, bootstrap)]

    def forward(backend: str) -> list[Tensor]:
        return [ops.lambda_return(*leaves, backend=backend)]

    return differentiable(forward, leaves)

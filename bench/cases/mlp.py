"""The heads' hidden layers, on the features of imagined states."""

from __future__ import annotations

import torch
from torch import Tensor

from apv_fast import ops
from apv_fast.nn.heads import Trunk
from bench.registry import BF16, FP32, OnDevice, Problem, case, differentiable

DTYPES = (FP32, BF16)


@case("mlp", [{"N": 6000, "F": 2048, "layers": 4, "units": 400}], dtypes=DTYPES, device=OnDevice())
def mlp(device: torch.device, dtype: torch.dtype, N: int, F: int, layers: int, units: int) -> Problem:
    """Those of 15 x 400 imagined states: gradients of weights and, as the reward head passes on, features."""
    trunk = Trunk(F, layers, units, dtype, "auto").to(device)
    feat = torch.randn(N, F, device=device, dtype=dtype).requires_grad_()
    leaves = [feat, *trunk.parameters()]

    def forward(backend: str) -> list[Tensor]:
        weights = [(layer.weight.to(dtype), layer.bias.to(dtype)) for layer in trunk.layers]
        return [ops.mlp(feat, weights, backend=backend)]  # type: ignore[arg-type]

    return differentiable(forward, leaves, slow_to_compile=True)

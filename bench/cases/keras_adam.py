"""The optimiser: clip, decay and Adam's step of all weights of a model."""

from __future__ import annotations

import torch

from apv_fast.optim import KerasAdam
from bench.registry import FORWARD, OnDevice, Problem, case

# [rows, columns] of an RSSM's dense layers at full size, each with a bias: 13.2 M numbers
LAYERS = [(1024, 1074), (3072, 2048), (1024, 1024), (1024, 1024), (1024, 2560), (1024, 1024)]


@case("keras_adam", [{"models": 1}])
@case("keras_adam", [{"models": 3}], device=OnDevice())
def keras_adam(device: torch.device, dtype: torch.dtype, models: int) -> Problem:
    """A step with 13 M or 40 M weights in 12 or 36 tensors, gradients given."""
    shapes = [shape for rows, columns in LAYERS for shape in ((rows, columns), (rows,))] * models

    def make(backend: str) -> KerasAdam:
        weights = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        return KerasAdam(weights, backend=backend)

    optimizers: dict[str, KerasAdam] = {}

    def step(name: str) -> object:
        if name not in optimizers:
            optimizers[name] = make(name)
        return optimizers[name].step()

    return Problem({FORWARD: step})

"""Imagining along given actions."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from apv_fast import ops
from bench.cases.parts.rssm import DTYPES, FULL, SMALL, Model, imagined
from bench.registry import BF16, COLD, OnDevice, Problem, case, differentiable

OP = "rssm_imagine"
PAPER = {"B": 2500, "T": 15, "A": 4, **FULL}


@case(OP, [{"B": 400, "T": 15, "A": 4, **FULL}], dtypes=DTYPES)
@case(OP, [{"B": 200, "T": 15, "A": 6, **SMALL}])
@case(OP, [PAPER], dtypes=DTYPES, slow=True)
def rssm_imagine(device: torch.device, dtype: torch.dtype, B: int, T: int, A: int, **sizes: int) -> Problem:
    """Gradients of the actions only, as behaviour learning wants them."""
    return _problem(Model(device, dtype, 1, A, sizes, B, T), B, T, A)


@case(OP, [PAPER], dtypes=(BF16,), bench=False, device=OnDevice(60, (COLD,)))
def on_device(device: torch.device, dtype: torch.dtype, B: int, T: int, A: int, **sizes: int) -> Problem:
    """The op alone; nobody compiles it."""
    return replace(_problem(Model(device, dtype, 1, A, sizes, B, T, alone=True), B, T, A), others={})


def _problem(model: Model, B: int, T: int, A: int) -> Problem:
    model.freeze()
    start = imagined(model.rssm.initial(B))
    action = (torch.rand(B, T, A, device=start["deter"].device) * 2 - 1).requires_grad_()

    def forward(backend: str) -> list[Tensor]:
        noise = model.noise_for(backend)[0]
        prior = ops.rssm_imagine(model.params(), start, action, latent=model.latent, noise=noise, backend=backend)
        return [prior["deter"], prior["stoch"]]

    return differentiable(forward, [action], slow_to_compile=True)

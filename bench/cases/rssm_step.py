"""One step of filtering, as when acting."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from apv_fast import ops
from bench.cases.parts.rssm import DTYPES, FULL, Model, read_by_losses
from bench.registry import FORWARD, OnDevice, Problem, case, differentiable


@case("rssm_step", [{"B": 1, "E": 1536, "A": 4, **FULL}], dtypes=DTYPES, device=OnDevice())
def rssm_step(device: torch.device, dtype: torch.dtype, B: int, E: int, A: int, **sizes: int) -> Problem:
    """Forward only."""
    model = Model(device, dtype, E, A, sizes, B)
    state, is_first = model.rssm.initial(B), torch.zeros(B, dtype=torch.bool, device=device)
    embed, action = torch.randn(B, E, device=device), torch.rand(B, A, device=device)

    def forward(backend: str) -> list[Tensor]:
        states = ops.rssm_step(
            model.params(), state, action, embed, is_first,
            latent=model.latent, noise=model.noise_for(backend), backend=backend,
        )  # fmt: skip
        return read_by_losses(*states)

    both = differentiable(forward, model.leaves())
    return replace(both, passes={FORWARD: both.passes[FORWARD]})

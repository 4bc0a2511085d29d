"""Imagination with the actor in the loop, as behaviour learning runs it."""

from __future__ import annotations

import torch
from torch import Tensor

from apv_fast import ops
from apv_fast.nn import Actor
from bench.cases.parts.rssm import DTYPES, FULL, SMALL, Model, imagined
from bench.registry import REFERENCE, WIDER, OnDevice, Problem, case, differentiable


@case("rssm_rollout", [{"B": 400, "T": 15, "A": 4, **FULL}], dtypes=DTYPES, wider=WIDER)
@case("rssm_rollout", [{"B": 200, "T": 15, "A": 6, **SMALL}])
@case("rssm_rollout", [{"B": 2500, "T": 15, "A": 4, **FULL}], dtypes=DTYPES, slow=True, device=OnDevice())
def rssm_rollout(device: torch.device, dtype: torch.dtype, B: int, T: int, A: int, **sizes: int) -> Problem:
    """From B start states T steps ahead; gradients of the actor's weights, through the dynamics."""
    model = Model(device, dtype, 1, A, sizes, T, B)
    model.freeze()
    actor = Actor(model.rssm.feat_dim, A, dtype=dtype).to(device)
    start = imagined(model.rssm.initial(B))
    uniforms = torch.rand(T, B, A, device=device)
    seeds = [torch.tensor(seed, device=device) for seed in (1, 2)]

    def forward(backend: str) -> list[Tensor]:
        # As in training: kernels make their noise from a seed; the reference's is made beforehand, in its favour.
        noises = (model.noise[0], uniforms) if backend == REFERENCE else seeds
        states, action = ops.rssm_rollout(
            model.params(), actor.params(), start, horizon=T, latent=model.latent,
            noise=noises[0], action_noise=noises[1], backend=backend,
        )  # fmt: skip
        return [states["deter"], states["stoch"], action]

    return differentiable(forward, list(actor.parameters()), slow_to_compile=True)

"""Imagination with the actor in the loop, as behaviour learning runs it."""

from __future__ import annotations

import torch
from torch import Tensor

from apv_fast import ops
from apv_fast.nn import RSSM, Actor
from bench.cases.rssm_observe import DTYPES, FULL, SMALL
from bench.registry import EAGER_FP32, REFERENCE, Problem, case, differentiable


@case("rssm_rollout", [{"B": 400, "T": 15, "A": 4, **FULL}], dtypes=DTYPES, wider=(EAGER_FP32,))
@case("rssm_rollout", [{"B": 200, "T": 15, "A": 6, **SMALL}])
@case("rssm_rollout", [{"B": 2500, "T": 15, "A": 4, **FULL}], dtypes=DTYPES, slow=True)
def rssm_rollout(device: torch.device, dtype: torch.dtype, B: int, T: int, A: int, **sizes: int) -> Problem:
    """From B start states T steps ahead; gradients of the actor's weights, through the dynamics."""
    rssm = RSSM(1, A, dtype=dtype, **sizes).to(device).requires_grad_(False)  # type: ignore[arg-type]
    actor = Actor(rssm.feat_dim, A, dtype=dtype).to(device)
    start = {key: torch.randn_like(value) for key, value in rssm.initial(B).items()}
    noise = ops.sample_noise(rssm.latent, T, B, dtype=torch.float32, device=device)
    uniforms = torch.rand(T, B, A, device=device)
    seeds = [torch.tensor(seed, device=device) for seed in (1, 2)]

    def forward(backend: str) -> list[Tensor]:
        # As in training: kernels make their noise from a seed; the reference's is made beforehand, in its favour.
        noises = (noise, uniforms) if backend == REFERENCE else seeds
        states, action = ops.rssm_rollout(
            rssm.params(), actor.params(), start, horizon=T, latent=rssm.latent,
            noise=noises[0], action_noise=noises[1], backend=backend,
        )  # fmt: skip
        return [states["deter"], states["stoch"], action]

    return differentiable(forward, list(actor.parameters()), slow_to_compile=True)

"""The prior rolled out without looking, step by step."""

from __future__ import annotations

from torch import Tensor

from apv_fast.reference.noise import whole_noise
from apv_fast.reference.rssm_step import at, img_step, stack
from apv_fast.types import Latent, RSSMParams, State


def rssm_imagine(
    params: RSSMParams, state: State, action: Tensor | None, horizon: int, latent: Latent, noise: Tensor | None
) -> State:
    """Roll the prior out ``horizon`` steps from ``state``; ``[B, horizon, ...]``."""
    noise = whole_noise(noise, (len(state["deter"]), horizon), latent, state["deter"].dtype)
    priors = []
    for t in range(horizon):
        state = img_step(params, state, at(action, t), latent, at(noise, t))
        priors.append(state)
    return stack(priors)

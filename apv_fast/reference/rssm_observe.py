"""Filtering a sequence, step by step (Hafner et al. 2019; Seo et al. 2022, equation 2)."""

from __future__ import annotations

from torch import Tensor

from apv_fast.reference.noise import whole_noise
from apv_fast.reference.rssm_step import at, obs_step, stack
from apv_fast.types import Latent, RSSMParams, State


def rssm_observe(
    params: RSSMParams,
    embed: Tensor,  # [B, T, E]
    is_first: Tensor,  # [B, T] bool
    action: Tensor | None,  # [B, T, A]
    state: State,  # deter [B, D], stoch [B, S, C] or [B, S]
    latent: Latent,
    post_noise: Tensor | None,  # [B, T, S, C] or [B, T, S]; None: modes
    prior_noise: Tensor | None,
) -> tuple[State, State]:
    """Filter a sequence: posterior and prior states, ``[B, T, ...]``."""
    leading, dtype = (embed.shape[0], embed.shape[1]), state["deter"].dtype
    post_noise, prior_noise = (whole_noise(noise, leading, latent, dtype) for noise in (post_noise, prior_noise))
    posts, priors = [], []
    for t in range(embed.shape[1]):
        post, prior = obs_step(
            params, state, at(action, t), embed[:, t], is_first[:, t], latent, at(post_noise, t), at(prior_noise, t)
        )
        posts.append(post)
        priors.append(prior)
        state = {"deter": post["deter"], "stoch": post["stoch"]}
    return stack(posts), stack(priors)

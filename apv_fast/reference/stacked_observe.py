"""Two models, of which the action-conditional one sees the action-free one (Seo et al. 2022, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from apv_fast.reference.rssm_observe import rssm_observe
from apv_fast.reference.rssm_step import feat
from apv_fast.types import Latent, NoisePair, RSSMParams, State


def stacked_observe(
    af_params: RSSMParams,
    params: RSSMParams,
    embed: Tensor,
    is_first: Tensor,
    action: Tensor,
    af_state: State,
    state: State,
    af_latent: Latent,
    latent: Latent,
    af_noise: NoisePair,  # of the posterior and the prior
    noise: NoisePair,
    concat_embed: bool,
) -> tuple[State, State, State, State]:
    """Filter with the action-free model, then with the action-conditional one on top of its posterior's features."""
    af_post, af_prior = rssm_observe(af_params, embed, is_first, None, af_state, af_latent, *af_noise)
    upper = feat(af_post)
    if concat_embed:
        upper = torch.cat([embed.to(upper.dtype), upper], -1)
    post, prior = rssm_observe(params, upper, is_first, action, state, latent, *noise)
    return af_post, af_prior, post, prior

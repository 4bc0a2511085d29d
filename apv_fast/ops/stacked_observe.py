"""Filtering with two stacked models. States and noise are as in :mod:`apv_fast.ops.rssm_observe`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apv_fast.ops.check import Arguments
from apv_fast.ops.noise import noise_pair
from apv_fast.ops.op import Op
from apv_fast.ops.rssm_checks import check_action, check_params, check_state
from apv_fast.ops.rssm_observe import RssmObserve, pack_pair, sizes_of, unpack_pair
from apv_fast.types import Latent, Noise, NoisePair, RSSMParams, State

Four = tuple[State, State, State, State]  # posterior and prior of the action-free model, then of the other


class StackedObserve(NamedTuple):
    """Checked arguments."""

    af_params: RSSMParams
    params: RSSMParams
    embed: Tensor  # [B, T, E]
    is_first: Tensor  # [B, T] bool
    action: Tensor  # [B, T, A]
    af_state: State
    state: State
    af_latent: Latent
    latent: Latent
    af_noise: NoisePair
    noise: NoisePair
    concat_embed: bool

    @property
    def lower(self) -> RssmObserve:
        """Of the action-free model."""
        return RssmObserve(
            self.af_params, self.embed, self.is_first, None, self.af_state, self.af_latent, *self.af_noise
        )

    @property
    def upper(self) -> RssmObserve:
        """Of the action-conditional model, whose embedding is only what the lower one does not give it."""
        embed = self.embed if self.concat_embed else self.embed[..., :0]
        return RssmObserve(self.params, embed, self.is_first, self.action, self.state, self.latent, *self.noise)


def _sizes(call: StackedObserve) -> dict[str, int]:
    lower = {f"af_{name}": size for name, size in sizes_of(call.af_params, call.af_latent).items()}
    return {"batch": call.embed.shape[0], **sizes_of(call.params, call.latent), **lower}


def _pack(call: StackedObserve, states: Four) -> list[Tensor]:
    return pack_pair(call.af_latent, *states[:2]) + pack_pair(call.latent, *states[2:])


def _unpack(call: StackedObserve, flat: Sequence[Tensor]) -> Four:
    split = 3 + 2 * len(call.af_latent.statistics)
    return *unpack_pair(call.af_latent, flat[:split]), *unpack_pair(call.latent, flat[split:])


OP: Op[StackedObserve, Four] = Op(
    "stacked_observe",
    StackedObserve,
    decides=lambda call: call.params[0],
    sizes=_sizes,
    returns="Tensor[]",
    pack=_pack,
    unpack=_unpack,
)


def stacked_observe(
    af_params: RSSMParams,
    params: RSSMParams,
    embed: Tensor,
    is_first: Tensor,
    action: Tensor,
    af_state: State | None = None,
    state: State | None = None,
    *,
    af_latent: Latent,
    latent: Latent,
    concat_embed: bool = False,
    sample: bool = True,
    af_noise: Noise = None,
    noise: Noise = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> dict[str, State]:
    """Filter with an action-free RSSM and with an action-conditional one that sees the features of its posterior.

    Args:
        af_params: weights of the action-free RSSM, which sees ``embed``.
        params: weights of the action-conditional one, which sees the action-free one's features (with ``concat_embed``:
            ``embed``, then the features).
        embed: ``[B, T, E]``.
        is_first: ``[B, T]`` bool.
        action: ``[B, T, A]``.
        af_state, state: before the first step; None: zeros.
        af_latent, latent: the kinds of latent.
        concat_embed: see ``params``.
        sample, af_noise, noise, generator, backend: as in :func:`apv_fast.ops.rssm_observe`.

    Returns:
        States ``[B, T, ...]`` under "af_post", "af_prior", "post" and "prior".

    Source: Seo et al. 2022, section 3.2, equation 4.
    """
    lower = Arguments("stacked_observe: action-free model")
    check_params(lower, af_params, af_latent)
    lower.tensor("embed", embed, "B T E")
    batch, length = embed.shape[:2]
    lower.require(length > 0, "embed has no steps; T must be at least 1")
    lower.tensor("is_first", is_first, "B T", torch.bool)
    upper = Arguments("stacked_observe: action-conditional model", B=batch, T=length)
    upper.device = lower.device
    check_params(upper, params, latent)
    width = af_latent.stoch * (af_latent.discrete or 1) + lower.sizes["D"] + concat_embed * lower.sizes["E"]
    upper.require(
        upper.sizes["E"] == width,
        f"params.obs_out_weight takes an embedding of {upper.sizes['E']}; the action-free model gives {width}",
    )
    upper.require(action is not None, "action is None; it must be [B, T, A]")
    check_action(upper, action, "B T A")
    af_state = check_state(lower, af_params, af_state, af_latent, batch)
    state = check_state(upper, params, state, latent, batch)
    af_pair = noise_pair(lower, af_params, af_latent, af_noise, sample, (batch, length), generator, backend)
    pair = noise_pair(upper, params, latent, noise, sample, (batch, length), generator, backend)
    models = (af_params, params, embed, is_first, action, af_state, state, af_latent, latent)
    af_post, af_prior, post, prior = OP(StackedObserve(*models, af_pair, pair, concat_embed), backend)
    return {"af_post": af_post, "af_prior": af_prior, "post": post, "prior": prior}

"""One step of a recurrent state-space model. States and noise are as in :mod:`apv_fast.ops.rssm_observe`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from apv_fast.ops.check import Arguments
from apv_fast.ops.noise import noise_pair
from apv_fast.ops.op import Op
from apv_fast.ops.rssm_checks import check_action, check_params, check_state
from apv_fast.ops.rssm_observe import pack_pair, unpack_pair
from apv_fast.types import Latent, Noise, RSSMParams, State


class RssmStep(NamedTuple):
    """Checked arguments."""

    params: RSSMParams
    state: State  # deter [B, D], stoch [B, S, C] or [B, S]
    action: Tensor | None  # [B, A]
    embed: Tensor | None  # [B, E]
    is_first: Tensor | None  # [B] bool
    latent: Latent
    post_noise: Tensor | None  # [B, S, C] or [B, S], a seed, or None: modes
    prior_noise: Tensor | None


OP: Op[RssmStep, tuple[State, State]] = Op(
    "rssm_step",
    RssmStep,
    decides=lambda call: call.params[0],
    returns="Tensor[]",
    pack=lambda call, states: pack_pair(call.latent, *states),
    unpack=lambda call, flat: unpack_pair(call.latent, flat),
)


def rssm_step(
    params: RSSMParams,
    state: State,
    action: Tensor | None = None,
    embed: Tensor | None = None,
    is_first: Tensor | None = None,
    *,
    latent: Latent,
    sample: bool = True,
    noise: Noise = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> tuple[State, State]:
    """One step: ``(post, prior)`` with an ``embed [B, E]`` and ``is_first [B]``; without them the prior, twice.

    ``action [B, A]`` leads to the step; noise is ``[B, S, C]`` or ``[B, S]``. For the rest see
    :func:`apv_fast.ops.rssm_observe`.
    """
    arguments = Arguments("rssm_step")
    check_params(arguments, params, latent)
    arguments.require(state is not None, "state is None; it must be a state to start from")
    state = check_state(arguments, params, state, latent, 0)
    arguments.require((embed is None) == (is_first is None), "embed and is_first must be given together")
    if embed is not None and is_first is not None:
        arguments.tensor("embed", embed, "B E")
        arguments.tensor("is_first", is_first, "B", torch.bool)
    check_action(arguments, action, "B A")
    leading = (len(state["deter"]),)
    post_noise, prior_noise = noise_pair(arguments, params, latent, noise, sample, leading, generator, backend)
    call = RssmStep(params, state, action, embed, is_first, latent, post_noise, prior_noise)
    return OP(call, backend)

"""Filtering a whole sequence with a recurrent state-space model.

States are dictionaries with DreamerV2's keys: ``deter [..., D]``; ``stoch [..., S, C]`` and ``logit [..., S, C]`` for
categorical latents; ``stoch``, ``mean`` and ``std``, all ``[..., S]``, for Gaussian ones.

Noise is Gumbel ``[B, T, S, C]`` (``stoch = onehot(argmax(logit + noise))``) or standard normal ``[B, T, S]``
(``stoch = mean + std·noise``). An int64 scalar is a seed: the counter-based noise of :mod:`apv_fast.reference.noise`,
the same on every backend. One tensor fixes the samples of posterior and prior alike; a pair fixes them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apv_fast.ops.check import Arguments
from apv_fast.ops.noise import noise_pair
from apv_fast.ops.op import Op
from apv_fast.ops.rssm_checks import check_action, check_params, check_state
from apv_fast.types import Latent, Noise, RSSMParams, State


class RssmObserve(NamedTuple):
    """Checked arguments."""

    params: RSSMParams
    embed: Tensor  # [B, T, E]
    is_first: Tensor  # [B, T] bool
    action: Tensor | None  # [B, T, A]
    state: State  # deter [B, D], stoch [B, S, C] or [B, S]
    latent: Latent
    post_noise: Tensor | None  # [B, T, S, C] or [B, T, S], a seed, or None: modes
    prior_noise: Tensor | None


def pack_pair(latent: Latent, post: State, prior: State) -> list[Tensor]:
    """Posterior and prior, which share deter, as tensors."""
    names = latent.statistics
    return [post["deter"], post["stoch"], prior["stoch"], *(post[n] for n in names), *(prior[n] for n in names)]


def unpack_pair(latent: Latent, flat: Sequence[Tensor]) -> tuple[State, State]:
    """What :func:`pack_pair` packed."""
    deter, post_stoch, prior_stoch, *statistics = flat
    names, count = latent.statistics, len(latent.statistics)
    post = {"deter": deter, "stoch": post_stoch, **dict(zip(names, statistics[:count], strict=True))}
    return post, {"deter": deter, "stoch": prior_stoch, **dict(zip(names, statistics[count:], strict=True))}


def sizes_of(params: RSSMParams, latent: Latent) -> dict[str, int]:
    """What decides whether a backend has room for a scan."""
    hidden, deter = params.img_out_weight.shape
    return {"deter": deter, "hidden": hidden, "stoch": latent.stoch, "discrete": latent.discrete}


OP: Op[RssmObserve, tuple[State, State]] = Op(
    "rssm_observe",
    RssmObserve,
    decides=lambda call: call.params[0],
    sizes=lambda call: {"batch": call.embed.shape[0], **sizes_of(call.params, call.latent)},
    returns="Tensor[]",
    pack=lambda call, states: pack_pair(call.latent, *states),
    unpack=lambda call, flat: unpack_pair(call.latent, flat),
)


def rssm_observe(
    params: RSSMParams,
    embed: Tensor,
    is_first: Tensor,
    action: Tensor | None = None,
    state: State | None = None,
    *,
    latent: Latent,
    sample: bool = True,
    noise: Noise = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> tuple[State, State]:
    """Filter a sequence of observations.

    Args:
        params: the weights; their dtype is that of the matrix products.
        embed: ``[B, T, E]``, any floating dtype; T ≥ 1.
        is_first: ``[B, T]`` bool; where True, state and action before that step count as zeros.
        action: ``[B, T, A]``, the action that led to each observation; None: zeros.
        state: before the first step, ``deter [B, D]`` and ``stoch``; None: zeros.
        latent: the kind of latent.
        sample: sample the latents; else take modes, which have no straight-through gradient.
        noise: see the module; None draws it from ``generator``.
        generator: random numbers for ``noise=None``; None: torch's default.
        backend: see :mod:`apv_fast.backend`.

    Returns:
        ``(post, prior)`` states, ``[B, T, ...]``, in float32 (float64 for float64 weights).

    Raises:
        TypeError: an argument is no tensor or has a wrong dtype.
        ValueError: shapes do not fit, or T = 0.

    Source: Hafner et al. 2019; Seo et al. 2022, equation 2.
    """
    arguments = Arguments("rssm_observe")
    check_params(arguments, params, latent)
    arguments.tensor("embed", embed, "B T E")
    batch, length = embed.shape[:2]
    arguments.require(length > 0, "embed has no steps; T must be at least 1")
    arguments.tensor("is_first", is_first, "B T", torch.bool)
    check_action(arguments, action, "B T A")
    state = check_state(arguments, params, state, latent, batch)
    post_noise, prior_noise = noise_pair(arguments, params, latent, noise, sample, (batch, length), generator, backend)
    call = RssmObserve(params, embed, is_first, action, state, latent, post_noise, prior_noise)
    return OP(call, backend)

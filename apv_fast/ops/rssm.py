"""Whole-sequence ops of the recurrent state-space model: filter, imagine, one step, and two models stacked.

States are dictionaries with DreamerV2's keys: ``deter [..., D]``; ``stoch [..., S, C]`` and ``logit [..., S, C]`` for
categorical latents; ``stoch``, ``mean`` and ``std``, all ``[..., S]``, for Gaussian ones.

Noise is Gumbel ``[B, T, S, C]`` (``stoch = onehot(argmax(logit + noise))``) or standard normal ``[B, T, S]``
(``stoch = mean + std·noise``). An int64 scalar is a seed: the counter-based noise of :mod:`apv_fast.reference.noise`,
the same on every backend. One tensor fixes the samples of posterior and prior alike; a pair fixes them apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from apv_fast.backend import resolve
from apv_fast.ops.check import Arguments
from apv_fast.ops.library import define
from apv_fast.ops.rssm_arguments import Noise, check_action, check_params, check_state, noise_pair
from apv_fast.types import Latent, RSSMParams, State

# Tensors and plain numbers only, as torch.library wants them: a state is (deter, stoch) going in and
# deter, post stoch, prior stoch, post statistics, prior statistics coming out.
_STATISTICS = 3  # where the statistics begin


def _flatten(post: State, prior: State, latent: Latent) -> list[Tensor]:
    names = latent.statistics
    return [post["deter"], post["stoch"], prior["stoch"], *(post[n] for n in names), *(prior[n] for n in names)]


def _unflatten(flat: Sequence[Tensor], latent: Latent) -> tuple[State, State]:
    deter, post_stoch, prior_stoch = flat[:_STATISTICS]
    middle = _STATISTICS + len(latent.statistics)
    post = {"deter": deter, "stoch": post_stoch, **dict(zip(latent.statistics, flat[_STATISTICS:middle], strict=True))}
    prior = {"deter": deter, "stoch": prior_stoch, **dict(zip(latent.statistics, flat[middle:], strict=True))}
    return post, prior


def _sizes(params: Sequence[Tensor], deter: Tensor, S: int, C: int) -> dict[str, int]:
    """What decides whether a backend has room for a scan."""
    return {"deter": deter.shape[1], "hidden": len(params[1]), "stoch": S, "discrete": C}


@define(
    "rssm_observe(Tensor[] params, Tensor embed, Tensor is_first, Tensor? action, Tensor deter, Tensor stoch, "
    "int S, int C, float min_std, Tensor? post_noise, Tensor? prior_noise, str backend) -> Tensor[]"
)
def _rssm_observe(
    params: list[Tensor],
    embed: Tensor,
    is_first: Tensor,
    action: Tensor | None,
    deter: Tensor,
    stoch: Tensor,
    S: int,
    C: int,
    min_std: float,
    post_noise: Tensor | None,
    prior_noise: Tensor | None,
    backend: str,
) -> list[Tensor]:
    latent = Latent(S, C, min_std)
    function = resolve("rssm_observe", params[0], backend, batch=len(embed), **_sizes(params, deter, S, C))
    state = {"deter": deter, "stoch": stoch}
    post, prior = function(RSSMParams(*params), embed, is_first, action, state, latent, post_noise, prior_noise)
    return _flatten(post, prior, latent)


@define(
    "rssm_imagine(Tensor[] params, Tensor? action, Tensor deter, Tensor stoch, int horizon, int S, int C, "
    "float min_std, Tensor? noise, str backend) -> Tensor[]"
)
def _rssm_imagine(
    params: list[Tensor],
    action: Tensor | None,
    deter: Tensor,
    stoch: Tensor,
    horizon: int,
    S: int,
    C: int,
    min_std: float,
    noise: Tensor | None,
    backend: str,
) -> list[Tensor]:
    latent = Latent(S, C, min_std)
    function = resolve("rssm_imagine", params[0], backend)
    prior = function(RSSMParams(*params), {"deter": deter, "stoch": stoch}, action, horizon, latent, noise)
    return [prior["deter"], prior["stoch"], *(prior[name] for name in latent.statistics)]


@define(
    "rssm_step(Tensor[] params, Tensor deter, Tensor stoch, Tensor? action, Tensor? embed, Tensor? is_first, "
    "int S, int C, float min_std, Tensor? post_noise, Tensor? prior_noise, str backend) -> Tensor[]"
)
def _rssm_step(
    params: list[Tensor],
    deter: Tensor,
    stoch: Tensor,
    action: Tensor | None,
    embed: Tensor | None,
    is_first: Tensor | None,
    S: int,
    C: int,
    min_std: float,
    post_noise: Tensor | None,
    prior_noise: Tensor | None,
    backend: str,
) -> list[Tensor]:
    latent = Latent(S, C, min_std)
    function = resolve("rssm_step", params[0], backend)
    state = {"deter": deter, "stoch": stoch}
    post, prior = function(RSSMParams(*params), state, action, embed, is_first, latent, post_noise, prior_noise)
    return _flatten(post, prior, latent)


@define(
    "stacked_observe(Tensor[] af_params, Tensor[] params, Tensor embed, Tensor is_first, Tensor action, "
    "Tensor af_deter, Tensor af_stoch, Tensor deter, Tensor stoch, int af_S, int af_C, float af_min_std, int S, int C, "
    "float min_std, Tensor? af_post_noise, Tensor? af_prior_noise, Tensor? post_noise, Tensor? prior_noise, "
    "bool concat_embed, str backend) -> Tensor[]"
)
def _stacked_observe(
    af_params: list[Tensor],
    params: list[Tensor],
    embed: Tensor,
    is_first: Tensor,
    action: Tensor,
    af_deter: Tensor,
    af_stoch: Tensor,
    deter: Tensor,
    stoch: Tensor,
    af_S: int,
    af_C: int,
    af_min_std: float,
    S: int,
    C: int,
    min_std: float,
    af_post_noise: Tensor | None,
    af_prior_noise: Tensor | None,
    post_noise: Tensor | None,
    prior_noise: Tensor | None,
    concat_embed: bool,
    backend: str,
) -> list[Tensor]:
    af_latent, latent = Latent(af_S, af_C, af_min_std), Latent(S, C, min_std)
    lower = {f"af_{name}": size for name, size in _sizes(af_params, af_deter, af_S, af_C).items()}
    sizes = _sizes(params, deter, S, C) | lower
    af_post, af_prior, post, prior = resolve("stacked_observe", params[0], backend, batch=len(embed), **sizes)(
        RSSMParams(*af_params),
        RSSMParams(*params),
        embed,
        is_first,
        action,
        {"deter": af_deter, "stoch": af_stoch},
        {"deter": deter, "stoch": stoch},
        af_latent,
        latent,
        (af_post_noise, af_prior_noise),
        (post_noise, prior_noise),
        concat_embed,
    )
    return _flatten(af_post, af_prior, af_latent) + _flatten(post, prior, latent)


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
    flat = torch.ops.apv_fast.rssm_observe(
        list(params),
        embed,
        is_first,
        action,
        state["deter"],
        state["stoch"],
        *latent,
        post_noise,
        prior_noise,
        backend or "",
    )
    return _unflatten(flat, latent)


def rssm_imagine(
    params: RSSMParams,
    state: State,
    action: Tensor | None = None,
    horizon: int | None = None,
    *,
    latent: Latent,
    sample: bool = True,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> State:
    """Roll the prior out from ``state`` without looking.

    Args:
        params: the weights.
        state: where to start, ``[B, ...]``.
        action: ``[B, T, A]``; None: zeros, and ``horizon`` is needed.
        horizon: number of steps T; None: as many as there are actions.
        latent: the kind of latent.
        sample: sample the latents, else take modes.
        noise: ``[B, T, S, C]`` or ``[B, T, S]``, see the module.
        generator: random numbers for ``noise=None``.
        backend: see :mod:`apv_fast.backend`.

    Returns:
        Prior states ``[B, T, ...]``.

    Raises:
        TypeError: an argument is no tensor or has a wrong dtype.
        ValueError: shapes do not fit, neither ``action`` nor ``horizon`` is given, or they disagree.
    """
    arguments = Arguments("rssm_imagine")
    check_params(arguments, params, latent)
    arguments.require(state is not None, "state is None; it must be a state to start from")
    state = check_state(arguments, params, state, latent, 0)
    if action is not None:
        horizon = action.shape[1] if horizon is None and action.dim() == 3 else horizon
    arguments.require(horizon is not None and horizon >= 1, f"horizon is {horizon}; without actions it must be ≥ 1")
    assert horizon is not None
    arguments.sizes["T"] = horizon
    check_action(arguments, action, "B T A")
    batch = len(state["deter"])
    used, _ = noise_pair(arguments, params, latent, noise, sample, (batch, horizon), generator, backend)
    flat = torch.ops.apv_fast.rssm_imagine(
        list(params), action, state["deter"], state["stoch"], horizon, *latent, used, backend or ""
    )
    return dict(zip(("deter", "stoch", *latent.statistics), flat, strict=True))


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

    ``action [B, A]`` leads to the step; noise is ``[B, S, C]`` or ``[B, S]``. For the rest see :func:`rssm_observe`.
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
    flat = torch.ops.apv_fast.rssm_step(
        list(params),
        state["deter"],
        state["stoch"],
        action,
        embed,
        is_first,
        *latent,
        post_noise,
        prior_noise,
        backend or "",
    )
    return _unflatten(flat, latent)


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
        sample, af_noise, noise, generator, backend: as in :func:`rssm_observe`.

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
    flat = torch.ops.apv_fast.stacked_observe(
        list(af_params),
        list(params),
        embed,
        is_first,
        action,
        af_state["deter"],
        af_state["stoch"],
        state["deter"],
        state["stoch"],
        *af_latent,
        *latent,
        *af_pair,
        *pair,
        concat_embed,
        backend or "",
    )
    split = _STATISTICS + 2 * len(af_latent.statistics)
    af_post, af_prior = _unflatten(flat[:split], af_latent)
    post, prior = _unflatten(flat[split:], latent)
    return {"af_post": af_post, "af_prior": af_prior, "post": post, "prior": prior}

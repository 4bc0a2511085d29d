"""Whole-sequence ops of the recurrent state-space model: filter, imagine, one step, and two models stacked.

States are dictionaries with DreamerV2's keys: ``deter [..., D]``; ``stoch [..., S, C]`` and ``logit [..., S, C]`` for
categorical latents; ``stoch``, ``mean`` and ``std``, all ``[..., S]``, for Gaussian ones.

Noise is Gumbel ``[B, T, S, C]`` (``stoch = onehot(argmax(logit + noise))``) or standard normal ``[B, T, S]``
(``stoch = mean + std·noise``). One tensor fixes the samples of posterior and prior alike; a pair fixes them apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from apv_fast.backend import resolve
from apv_fast.ops.check import Arguments
from apv_fast.ops.library import define
from apv_fast.structure import Latent, RSSMParams, State, state_dtype

Noise = Tensor | tuple[Tensor, Tensor] | None

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
    function = resolve("rssm_observe", params[0], backend)
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
    af_post, af_prior, post, prior = resolve("stacked_observe", params[0], backend)(
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


def initial_state(params: RSSMParams, latent: Latent, batch_size: int) -> State:
    """All zeros: ``deter [B, D]``, ``stoch`` and the statistics ``[B, S, C]`` or ``[B, S]``."""
    dtype, device = state_dtype(params.gru_weight.dtype), params.gru_weight.device
    shape = (latent.stoch, latent.discrete) if latent.discrete else (latent.stoch,)
    deter_size = params.gru_weight.shape[0] // 3
    state = {"deter": torch.zeros(batch_size, deter_size, dtype=dtype, device=device)}
    return state | {
        name: torch.zeros(batch_size, *shape, dtype=dtype, device=device) for name in ("stoch", *latent.statistics)
    }


def sample_noise(
    latent: Latent, *leading: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """Noise for ``leading`` states: Gumbel ``[..., S, C]`` or standard normal ``[..., S]``."""
    if latent.discrete:
        shape = (*leading, latent.stoch, latent.discrete)
        return -torch.empty(shape, dtype=dtype, device=device).exponential_(generator=generator).log()
    return torch.randn(*leading, latent.stoch, dtype=dtype, device=device, generator=generator)


def _check_params(arguments: Arguments, params: RSSMParams, latent: Latent) -> None:
    """Check the weights against each other; binds H, D, M, and E and IN by the widths that are left."""
    arguments.require(len(params) == len(RSSMParams._fields), f"params has {len(params)} tensors; see RSSMParams")
    arguments.require(latent.stoch >= 1, f"stoch is {latent.stoch}; it must be at least 1")
    arguments.require(latent.discrete >= 0, f"discrete is {latent.discrete}; it must be at least 0 (0: Gaussian)")
    statistics = latent.stoch * (latent.discrete or 2)
    arguments.sizes.update({"M": statistics, "S": latent.stoch, "C": latent.discrete})
    dtype = params.img_in_weight.dtype
    arguments.tensor("params.img_in_weight", params.img_in_weight, "H IN")
    arguments.tensor("params.img_out_weight", params.img_out_weight, "H D", dtype)
    hidden, deter = arguments.sizes["H"], arguments.sizes["D"]
    arguments.sizes.update({"3*D": 3 * deter, "H+D": hidden + deter})
    arguments.tensor("params.gru_weight", params.gru_weight, "3*D H+D", dtype)
    for name, dims in (("img_dist_weight", "M H"), ("obs_dist_weight", "M H"), ("obs_out_weight", "H D+E")):
        arguments.tensor(f"params.{name}", getattr(params, name), dims, dtype)
    for name in ("img_in_bias", "img_out_bias", "obs_out_bias"):
        arguments.tensor(f"params.{name}", getattr(params, name), "H", dtype)
    for name in ("gru_bias", "gru_norm_weight", "gru_norm_bias"):
        arguments.tensor(f"params.{name}", getattr(params, name), "3*D", dtype)
    for name in ("img_dist_bias", "obs_dist_bias"):
        arguments.tensor(f"params.{name}", getattr(params, name), "M", dtype)
    arguments.sizes["E"] = arguments.sizes["D+E"] - deter
    arguments.sizes["P"] = arguments.sizes["IN"] - latent.stoch * (latent.discrete or 1)


def _check_action(arguments: Arguments, action: Tensor | None, dims: str) -> None:
    arguments.sizes.pop("A", None)
    if action is None:
        return
    arguments.tensor("action", action, dims, None)
    width, pad = action.shape[-1], arguments.sizes["P"]
    arguments.require(width <= pad, f"action has {width} numbers; the model pads actions to {pad}, so at most {pad}")


def _stoch_dims(latent: Latent, leading: str) -> str:
    return f"{leading} S C" if latent.discrete else f"{leading} S"


def _check_state(arguments: Arguments, params: RSSMParams, state: State | None, latent: Latent, batch: int) -> State:
    """The state, zeros if None, in the states' dtype."""
    if state is None:
        return initial_state(params, latent, batch)
    for key in ("deter", "stoch"):
        arguments.require(key in state, f"state has the keys {sorted(state)}; it must have 'deter' and 'stoch'")
    arguments.tensor("state['deter']", state["deter"], "B D")
    arguments.tensor("state['stoch']", state["stoch"], _stoch_dims(latent, "B"))
    dtype = state_dtype(params.gru_weight.dtype)
    return {"deter": state["deter"].to(dtype), "stoch": state["stoch"].to(dtype)}


def _noise_pair(
    arguments: Arguments,
    params: RSSMParams,
    latent: Latent,
    noise: Noise,
    sample: bool,
    leading: tuple[int, ...],
    generator: torch.Generator | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Noise of posterior and prior: as given, else drawn, else (None, None) for modes."""
    if not sample:
        return None, None
    if noise is None:
        dtype, device = state_dtype(params.gru_weight.dtype), params.gru_weight.device
        first = sample_noise(latent, *leading, dtype=dtype, device=device, generator=generator)
        return first, sample_noise(latent, *leading, dtype=dtype, device=device, generator=generator)
    pair = (noise, noise) if isinstance(noise, Tensor) else noise
    arguments.require(len(pair) == 2, f"noise has {len(pair)} tensors; it must be one, or a pair (posterior, prior)")
    dims = _stoch_dims(latent, "B T"[: 2 * len(leading) - 1])
    for name, x in zip(("noise of the posterior", "noise of the prior"), pair, strict=True):
        arguments.tensor(name, x, dims)
    dtype = state_dtype(params.gru_weight.dtype)
    return pair[0].to(dtype), pair[1].to(dtype)


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
    _check_params(arguments, params, latent)
    arguments.tensor("embed", embed, "B T E")
    batch, length = embed.shape[:2]
    arguments.require(length > 0, "embed has no steps; T must be at least 1")
    arguments.tensor("is_first", is_first, "B T", torch.bool)
    _check_action(arguments, action, "B T A")
    state = _check_state(arguments, params, state, latent, batch)
    post_noise, prior_noise = _noise_pair(arguments, params, latent, noise, sample, (batch, length), generator)
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
    _check_params(arguments, params, latent)
    arguments.require(state is not None, "state is None; it must be a state to start from")
    state = _check_state(arguments, params, state, latent, 0)
    if action is not None:
        horizon = action.shape[1] if horizon is None and action.dim() == 3 else horizon
    arguments.require(horizon is not None and horizon >= 1, f"horizon is {horizon}; without actions it must be ≥ 1")
    assert horizon is not None
    arguments.sizes["T"] = horizon
    _check_action(arguments, action, "B T A")
    batch = len(state["deter"])
    used, _ = _noise_pair(arguments, params, latent, noise, sample, (batch, horizon), generator)
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
    _check_params(arguments, params, latent)
    arguments.require(state is not None, "state is None; it must be a state to start from")
    state = _check_state(arguments, params, state, latent, 0)
    arguments.require((embed is None) == (is_first is None), "embed and is_first must be given together")
    if embed is not None and is_first is not None:
        arguments.tensor("embed", embed, "B E")
        arguments.tensor("is_first", is_first, "B", torch.bool)
    _check_action(arguments, action, "B A")
    leading = (len(state["deter"]),)
    post_noise, prior_noise = _noise_pair(arguments, params, latent, noise, sample, leading, generator)
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
    _check_params(lower, af_params, af_latent)
    lower.tensor("embed", embed, "B T E")
    batch, length = embed.shape[:2]
    lower.require(length > 0, "embed has no steps; T must be at least 1")
    lower.tensor("is_first", is_first, "B T", torch.bool)
    upper = Arguments("stacked_observe: action-conditional model", B=batch, T=length)
    upper.device = lower.device
    _check_params(upper, params, latent)
    width = af_latent.stoch * (af_latent.discrete or 1) + lower.sizes["D"] + concat_embed * lower.sizes["E"]
    upper.require(
        upper.sizes["E"] == width,
        f"params.obs_out_weight takes an embedding of {upper.sizes['E']}; the action-free model gives {width}",
    )
    upper.require(action is not None, "action is None; it must be [B, T, A]")
    _check_action(upper, action, "B T A")
    af_state = _check_state(lower, af_params, af_state, af_latent, batch)
    state = _check_state(upper, params, state, latent, batch)
    af_pair = _noise_pair(lower, af_params, af_latent, af_noise, sample, (batch, length), generator)
    pair = _noise_pair(upper, params, latent, noise, sample, (batch, length), generator)
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

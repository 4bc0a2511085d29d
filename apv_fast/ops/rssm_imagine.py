"""Imagining a whole sequence: the prior rolled out. States and noise are as in :mod:`apv_fast.ops.rssm_observe`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from apv_fast.ops.check import Arguments
from apv_fast.ops.noise import noise_pair
from apv_fast.ops.op import Op
from apv_fast.ops.rssm_checks import check_action, check_params, check_state
from apv_fast.types import Latent, RSSMParams, State


class RssmImagine(NamedTuple):
    """Checked arguments."""

    params: RSSMParams
    state: State  # deter [B, D], stoch [B, S, C] or [B, S]
    action: Tensor | None  # [B, T, A]
    horizon: int  # T
    latent: Latent
    noise: Tensor | None  # [B, T, S, C] or [B, T, S], a seed, or None: modes


OP: Op[RssmImagine, State] = Op(
    "rssm_imagine",
    RssmImagine,
    decides=lambda call: call.params[0],
    returns="Tensor[]",
    pack=lambda call, prior: [prior[name] for name in ("deter", "stoch", *call.latent.statistics)],
    unpack=lambda call, flat: dict(zip(("deter", "stoch", *call.latent.statistics), flat, strict=True)),
)


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
    return OP(RssmImagine(params, state, action, horizon, latent, used), backend)

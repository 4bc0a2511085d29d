"""Imagination with the actor in the loop, as behaviour learning wants it: the whole roll-out in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apv_fast.backend import choose
from apv_fast.ops.check import Arguments
from apv_fast.ops.noise import sample_noise
from apv_fast.ops.op import Op
from apv_fast.ops.rssm_checks import check_params, check_state, stoch_dims
from apv_fast.types import ActorParams, Latent, RSSMParams, State, state_dtype


class RssmRollout(NamedTuple):
    """Checked arguments."""

    params: RSSMParams
    actor: ActorParams
    state: State  # deter [N, D], stoch [N, S, C] or [N, S]
    horizon: int
    latent: Latent
    min_std: float
    noise: Tensor  # [H, N, S, C] or [H, N, S], or a seed
    action_noise: Tensor  # [H, N, A], or a seed


def _pack(call: RssmRollout, result: tuple[State, Tensor]) -> list[Tensor]:
    states, action = result
    return [states["deter"], states["stoch"], *(states[name] for name in call.latent.statistics), action]


def _unpack(call: RssmRollout, flat: Sequence[Tensor]) -> tuple[State, Tensor]:
    return dict(zip(("deter", "stoch", *call.latent.statistics), flat[:-1], strict=True)), flat[-1]


OP: Op[RssmRollout, tuple[State, Tensor]] = Op(
    "rssm_rollout",
    RssmRollout,
    decides=lambda call: call.params[0],
    returns="Tensor[]",
    pack=_pack,
    unpack=_unpack,
)


def rssm_rollout(
    params: RSSMParams,
    actor: ActorParams,
    state: State,
    *,
    horizon: int,
    latent: Latent,
    min_std: float = 0.1,
    noise: Tensor | None = None,
    action_noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> tuple[State, Tensor]:
    """Imagine from start states with actions from the actor, which is fed ``sg(feat)`` of the state before each step.

    Imagined sequences are horizon-first. Differentiable with respect to the actor's weights, through the dynamics, and
    to the start states. Never with respect to ``params``: behaviour learning has the world model frozen, so its weights
    count as constants here.

    Args:
        params: the world model's weights; their dtype is that of all products.
        actor: the actor's, in the same dtype.
        state: where to start, ``deter [N, D]`` and ``stoch [N, S, C]`` or ``[N, S]``.
        horizon: number of steps H ≥ 1.
        latent: the kind of latent.
        min_std: least scale of the truncated normal; one-hot actions do not read it.
        noise: of the latents, Gumbel ``[H, N, S, C]`` or standard normal ``[H, N, S]``; an int64 scalar is a seed for
            counter-based noise. None draws it.
        action_noise: uniforms in [0, 1) ``[H, N, A]``, for one-hot actions Gumbel; or a seed. None draws it.
        generator: random numbers for what is drawn, the actions' first; None: torch's default.
        backend: see :mod:`apv_fast.backend`.

    Returns:
        Prior states and the actions that led to them, ``[H, N, ...]``, in float32 (float64 for float64 weights).

    Raises:
        TypeError: an argument is no tensor or has a wrong dtype.
        ValueError: shapes do not fit, or ``horizon`` is below 1.
    """
    arguments = Arguments("rssm_rollout")
    check_params(arguments, params, latent)
    arguments.require(state is not None, "state is None; it must be a state to start from")
    state = check_state(arguments, params, state, latent, 0)
    arguments.require(horizon >= 1, f"horizon is {horizon}; it must be at least 1")
    _check_actor(arguments, params, actor, latent)
    arguments.sizes |= {"T": horizon, "N": len(state["deter"])}
    noises = _noises(arguments, params, actor, latent, (action_noise, noise), generator, backend)
    frozen = RSSMParams(*(weight.detach() for weight in params))
    call = RssmRollout(frozen, actor, state, horizon, latent, min_std, noises[1], noises[0])
    return OP(call, backend)


def _check_actor(arguments: Arguments, params: RSSMParams, actor: ActorParams, latent: Latent) -> None:
    """Check the actor's weights against each other and the model's; binds A."""
    layers = len(actor.trunk)
    arguments.require(layers >= 2 and layers % 2 == 0, f"actor.trunk has {layers} tensors; it must have two a layer")
    dtype = params.gru_weight.dtype
    arguments.sizes["L+D"] = latent.stoch * (latent.discrete or 1) + arguments.sizes["D"]
    before = "L+D"
    for i in range(0, layers, 2):
        units = f"U{i // 2}"
        arguments.tensor(f"actor.trunk[{i}]", actor.trunk[i], f"{units} {before}", dtype)
        arguments.tensor(f"actor.trunk[{i + 1}]", actor.trunk[i + 1], units, dtype)
        before = units
    heads = [("out_weight", f"A {before}"), ("out_bias", "A")]
    heads += [] if actor.discrete else [("std_weight", f"A {before}"), ("std_bias", "A")]
    arguments.sizes.pop("A", None)
    for name, dims in heads:
        arguments.tensor(f"actor.{name}", getattr(actor, name), dims, dtype)
    width, pad = arguments.sizes["A"], arguments.sizes["P"]
    arguments.require(width <= pad, f"the actor has {width} actions; the model pads actions to {pad}, so at most {pad}")


def _noises(
    arguments: Arguments,
    params: RSSMParams,
    actor: ActorParams,
    latent: Latent,
    choices: tuple[Tensor | None, Tensor | None],
    generator: torch.Generator | None,
    backend: str | None,
) -> list[Tensor]:
    """Noise of the actions and of the latents, as given or drawn: on a GPU, for a fast backend, as seeds."""
    weight = params.gru_weight
    dtype, device = state_dtype(weight.dtype), weight.device
    dims = ("T N A", stoch_dims(latent, "T N"))
    kinds = (Latent(1, arguments.sizes["A"]), latent)
    seeded = device.type == "cuda" and choose("rssm_rollout", weight, backend) != "reference"
    noises = []
    for name, x, wanted, kind in zip(("action_noise", "noise"), choices, dims, kinds, strict=True):
        if x is None and seeded:
            x = torch.randint(-(2**63), 2**63 - 1, (), device=device, generator=generator)
        elif x is None and name == "action_noise" and not actor.discrete:
            shape = [arguments.sizes[dim] for dim in wanted.split()]
            x = torch.empty(shape, dtype=dtype, device=device).uniform_(generator=generator)
        elif x is None:
            x = sample_noise(
                kind, arguments.sizes["T"], arguments.sizes["N"], dtype=dtype, device=device, generator=generator
            )
            x = x.squeeze(2) if name == "action_noise" else x
        else:
            seed = isinstance(x, Tensor) and x.dim() == 0 and x.dtype == torch.int64
            arguments.tensor(name, x, "" if seed else wanted, torch.int64 if seed else None)
        noises.append(x if x.dtype == torch.int64 else x.to(dtype))
    return noises

"""``rssm_rollout`` as one opaque op: :mod:`apv_fast.kernels.imagine` with the actor in the loop; steps come first.

The way back is that of given actions, then the actor's. The world model's weights get no gradient: the op's contract.

Floor for 2500 starts at full size, a step: 53 GFLOP forward, 47 back without the actor's weights: 90 and 79 µs at
600 TFLOP/s. Launches a step: 11 forward, 5 back.
"""
# mypy: allow-untyped-decorators

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apv_fast.structure import ActorParams, Latent, RSSMParams, State

from .actor import Actor, ActorTrace
from .imagine import (
    OUTPUTS,
    Operands,
    OutputGrads,
    Start,
    Steps,
    Trace,
    Weights,
    action_grad,
    roll_out,
    start_stoch_grad,
    walk_back,
)
from .rssm_imagine import state_of, wants_gradients

_SCHEMA = (  # of Call, behind both models' weights
    "Tensor deter, Tensor stoch, int horizon, int S, int C, float latent_min_std, float min_std, bool discrete, "
    "Tensor noise, Tensor action_noise"
)
_LISTS = f"Tensor[] weights, Tensor[] actor, {_SCHEMA}"


class Call(NamedTuple):
    """Arguments of the op without the weights, in the schema's order."""

    deter: Tensor  # [N, D]
    stoch: Tensor  # [N, S, C] or [N, S]
    horizon: int
    S: int
    C: int
    latent_min_std: float
    min_std: float
    discrete: bool
    noise: Tensor  # [H, N, S, C] or [H, N, S], or a seed
    action_noise: Tensor  # [H, N, A], or a seed

    @property
    def latent(self) -> Latent:
        """The kind of latent."""
        return Latent(self.S, self.C, self.latent_min_std)

    @property
    def width(self) -> int:
        """L, of a flat latent."""
        return self.S * (self.C or 1)

    @property
    def steps(self) -> Steps:
        """Where the steps lie."""
        return Steps(self.horizon, len(self.deter), batch_first=False)

    def actor(self, tensors: list[Tensor]) -> Actor:
        """The actor of this call."""
        params = ActorParams.of(tensors, self.discrete)
        return Actor(params, self.width, self.steps, self.deter.shape[1], self.min_std, self.action_noise)


def _pack(trace: Trace, own: ActorTrace, keep: bool) -> list[Tensor]:
    """The op's outputs: deter, stoch, stats and action, then what the way back needs."""
    outputs = [*trace[:OUTPUTS], own.action]
    return [*outputs, *trace[OUTPUTS:], own.head, *own.hidden] if keep else outputs


def _unpack(tensors: Sequence[Tensor]) -> tuple[Trace, ActorTrace]:
    """From all of the outputs."""
    split = len(Trace._fields) + 1
    trace = Trace(*tensors[:OUTPUTS], *tensors[OUTPUTS + 1 : split])
    return trace, ActorTrace(tensors[OUTPUTS], tensors[split], list(tensors[split + 1 :]))


@torch.library.custom_op("apv_fast::rssm_rollout_triton", mutates_args=(), schema=f"({_LISTS}, bool keep) -> Tensor[]")
def _forward(weights: list[Tensor], actor: list[Tensor], *rest: Any) -> list[Tensor]:
    *arguments, keep = rest
    call = Call(*arguments)
    own = call.actor(actor)
    traced = own.room(call.deter, keep)

    def act(t: int, room: Operands) -> None:
        own.act(t, room, traced, keep)

    start = Start.of(call.deter, call.stoch)
    trace = roll_out(Weights.of(weights), start, act, own.actions, call.steps, call.latent, call.noise, keep)
    return _pack(trace, traced, keep)


@torch.library.custom_op(
    "apv_fast::rssm_rollout_triton_backward",
    mutates_args=(),
    schema=f"({_LISTS}, Tensor[] trace, Tensor?[] grads, bool of_stoch, bool of_actor) -> Tensor[]",
)
def _backward(weights: list[Tensor], actor: list[Tensor], *rest: Any) -> list[Tensor]:
    """Gradients of deter, stoch (empty unless ``of_stoch``) and the actor (empty unless ``of_actor``)."""
    *arguments, traces, (*of_states, of_action), of_stoch, of_actor = rest
    call, own = Call(*arguments), Weights.of(weights)
    start, steps = Start.of(call.deter, call.stoch), call.steps
    trace, traced = _unpack(traces)
    made = walk_back(own, start, trace, OutputGrads.of(of_states, steps), steps, call.latent, call.noise, False)
    stoch = call.deter.new_empty(0)
    if of_stoch:
        stoch = start_stoch_grad(own, made.x[0], call.width).view_as(call.stoch)
    if not of_actor:
        return [made.deter, stoch, *(call.deter.new_empty(0) for _ in actor)]
    model = call.actor(actor)
    grad = action_grad(own, made.x, call.width, model.actions, steps)
    grad = grad if of_action is None else grad.add_(of_action)
    return [made.deter, stoch, *model.backward(grad, traced, start, trace.deter, trace.stoch)]


@_forward.register_fake
def _(weights: Sequence[Tensor], actor: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    *arguments, keep = rest
    call, own = Call(*arguments), Weights(*weights)
    wide, narrow = call.deter, own.gru_weight

    def steps(like: Tensor, width: int) -> Tensor:
        return like.new_empty(call.horizon, call.deter.shape[0], width)

    params = ActorParams.of(list(actor), call.discrete)
    actions = params.out_bias.shape[0]
    heads = actions if call.discrete else 2 * actions
    deter, stoch, stats = (steps(wide, w) for w in (own.deter, call.width, own.img_dist_bias.shape[0]))
    x, parts, y = (steps(narrow, w) for w in (own.hidden, 3 * own.deter, own.hidden))
    hidden = [steps(narrow, bias.shape[0]) for bias in params.trunk[1::2]]
    trace = Trace(deter, stoch, stats, x, parts, steps(wide, 2), y)
    return _pack(trace, ActorTrace(steps(wide, actions), steps(wide, heads), hidden), keep)


@_backward.register_fake
def _(weights: Sequence[Tensor], actor: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    *arguments, _, _, of_stoch, of_actor = rest
    call = Call(*arguments)
    wide = call.deter
    stoch = wide.new_empty(call.stoch.shape if of_stoch else 0)
    return [
        wide.new_empty(wide.shape),
        stoch,
        *(x.new_empty(x.shape) if of_actor else wide.new_empty(0) for x in actor),
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    weights, actor, deter, stoch, *numbers, noise, action_noise, keep = inputs
    ctx.set_materialize_grads(False)
    ctx.numbers, ctx.counts = numbers, (len(weights), len(actor))
    ctx.mark_non_differentiable(*output[OUTPUTS + 1 :])
    if keep:
        ctx.save_for_backward(*weights, *actor, deter, stoch, noise, action_noise, *output)


def _differentiate(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    saved, (models, actors) = list(ctx.saved_tensors), ctx.counts
    weights, actor, rest = saved[:models], saved[models : models + actors], saved[models + actors :]
    deter, stoch, noise, action_noise, *trace = rest
    _, of_actor, of_deter, of_stoch, *_ = ctx.needs_input_grad
    wanted = any(of_actor)
    d_deter, d_stoch, *d_actor = _backward(
        weights,
        actor,
        deter,
        stoch,
        *ctx.numbers,
        noise,
        action_noise,
        trace,
        list(grads[: OUTPUTS + 1]),
        of_stoch,
        wanted,
    )
    return (
        [None] * models,
        d_actor if wanted else [None] * actors,
        d_deter if of_deter else None,
        d_stoch if of_stoch else None,
        *(None for _ in (*ctx.numbers, "noise", "action_noise", "keep")),
    )


_forward.register_autograd(_differentiate, setup_context=_save)


def rssm_rollout(
    params: RSSMParams,
    actor: ActorParams,
    state: State,
    horizon: int,
    latent: Latent,
    min_std: float,
    noise: Tensor,
    action_noise: Tensor,
) -> tuple[State, Tensor]:
    """Arguments and result as :func:`apv_fast.reference.imagination.rssm_rollout`, which see."""
    weights, own = list(params[: len(Weights._fields)]), actor.flat()
    start = (state["deter"], state["stoch"])
    keep = wants_gradients(*own, *start)
    deter, stoch, stats, action, *_ = _forward(
        weights, own, *start, horizon, *latent, min_std, actor.discrete, noise, action_noise, keep
    )
    return state_of(deter, stoch, stats, latent), action

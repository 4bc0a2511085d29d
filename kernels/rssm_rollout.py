"""``rssm_rollout`` by :mod:`apv_fast.kernels.parts.imagine` with the actor in the loop; steps come first.

The way back is that of given actions, then the actor's. The world model's weights get no gradient: the op's contract.

Floor for 2500 starts at full size, a step: 53 GFLOP forward, 47 back without the actor's weights: 90 and 79 µs at
600 TFLOP/s. Launches a step: 11 forward, 5 back.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from apv_fast.ops.op import Gradients
from apv_fast.recurrence.imagination import OUTPUTS, RolloutCall, rollout_on

from .parts.actor import Actor, ActorTrace
from .parts.imagine import (
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


def _steps(call: RolloutCall) -> Steps:
    return Steps(call.horizon, len(call.state["deter"]), batch_first=False)


def _start(call: RolloutCall) -> Start:
    return Start.of(call.state["deter"], call.state["stoch"])


def _actor(call: RolloutCall) -> Actor:
    return Actor(call.actor, call.width, _steps(call), call.state["deter"].shape[1], call.min_std, call.action_noise)


def _unpack(tensors: Sequence[Tensor]) -> tuple[Trace, ActorTrace]:
    """From all that the way forward left."""
    split = len(Trace._fields) + 1
    trace = Trace(*tensors[:OUTPUTS], *tensors[OUTPUTS + 1 : split])
    return trace, ActorTrace(tensors[OUTPUTS], tensors[split], list(tensors[split + 1 :]))


def _forward(call: RolloutCall, keep: bool) -> list[Tensor]:
    actor, weights = _actor(call), Weights.of(call.weights)
    traced = actor.room(call.state["deter"], keep)

    def act(t: int, room: Operands) -> None:
        actor.act(t, room, traced, keep)

    trace = roll_out(weights, _start(call), act, actor.actions, _steps(call), call.latent, call.noise, keep)
    outputs = [*trace[:OUTPUTS], traced.action]
    return [*outputs, *trace[OUTPUTS:], traced.head, *traced.hidden] if keep else outputs


def _backward(call: RolloutCall, results: list[Tensor], grads: list[Tensor | None], needs: frozenset[str]) -> Gradients:
    *of_states, of_action = grads
    own, start, steps = Weights.of(call.weights), _start(call), _steps(call)
    trace, traced = _unpack(results)
    grad_out = OutputGrads.of(of_states, steps)
    inner = walk_back(own, start, trace, grad_out, steps, call.latent, call.noise, False)
    out: Gradients = {"state_deter": inner.deter}
    if "state_stoch" in needs:
        out["state_stoch"] = start_stoch_grad(own, inner.x[0], call.width).view_as(call.state["stoch"])
    if "actor" in needs:
        actor = _actor(call)
        grad = action_grad(own, inner.x, call.width, actor.actions, steps)
        grad = grad if of_action is None else grad.add_(of_action)
        out["actor"] = actor.backward(grad, traced, start, trace.deter, trace.stoch)
    return out


def _kept(call: RolloutCall) -> list[Tensor]:
    own, wide = Weights(*call.weights), call.state["deter"]
    narrow, leading = own.gru_weight, (call.horizon, wide.shape[0])
    actions = call.actor.out_bias.shape[0]
    x, parts, y = (narrow.new_empty(*leading, w) for w in (own.hidden, 3 * own.deter, own.hidden))
    head = wide.new_empty(*leading, actions if call.actor.discrete else 2 * actions)
    hidden = [narrow.new_empty(*leading, bias.shape[0]) for bias in call.actor.trunk[1::2]]
    return [x, parts, wide.new_empty(*leading, 2), y, head, *hidden]


rssm_rollout = rollout_on("triton", _forward, _backward, _kept)

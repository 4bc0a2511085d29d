"""``rssm_rollout`` by :mod:`apv_fast.kernels.parts.imagine` with the actor in the loop; steps come first.

The way back is that of given actions, then the actor's. The world model's weights get no gradient: the op's contract.

Floor for 2500 starts at full size, a step: 53 GFLOP forward, 47 back without the actor's weights: 90 and 79 µs at
600 TFLOP/s. Launches a step: 11 forward, 5 back.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from apv_fast.recurrence.imagination import OUTPUTS, RolloutCall, define_rollout
from apv_fast.types import ActorParams

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
    return Steps(call.horizon, len(call.deter), batch_first=False)


def _actor(call: RolloutCall, tensors: list[Tensor]) -> Actor:
    params = ActorParams.of(tensors, call.discrete)
    return Actor(params, call.width, _steps(call), call.deter.shape[1], call.min_std, call.action_noise)


def _unpack(tensors: Sequence[Tensor]) -> tuple[Trace, ActorTrace]:
    """From all that the way forward left."""
    split = len(Trace._fields) + 1
    trace = Trace(*tensors[:OUTPUTS], *tensors[OUTPUTS + 1 : split])
    return trace, ActorTrace(tensors[OUTPUTS], tensors[split], list(tensors[split + 1 :]))


class _Rollout:
    """:class:`apv_fast.recurrence.imagination.Rollout`."""

    def forward(self, weights: list[Tensor], actor: list[Tensor], call: RolloutCall, keep: bool) -> list[Tensor]:
        own = _actor(call, actor)
        traced = own.room(call.deter, keep)

        def act(t: int, room: Operands) -> None:
            own.act(t, room, traced, keep)

        start = Start.of(call.deter, call.stoch)
        trace = roll_out(Weights.of(weights), start, act, own.actions, _steps(call), call.latent, call.noise, keep)
        outputs = [*trace[:OUTPUTS], traced.action]
        return [*outputs, *trace[OUTPUTS:], traced.head, *traced.hidden] if keep else outputs

    def backward(
        self,
        weights: list[Tensor],
        actor: list[Tensor],
        call: RolloutCall,
        trace: list[Tensor],
        grads: list[Tensor | None],
        of_stoch: bool,
        of_actor: bool,
    ) -> list[Tensor]:
        *of_states, of_action = grads
        own, start, steps = Weights.of(weights), Start.of(call.deter, call.stoch), _steps(call)
        walked, traced = _unpack(trace)
        given = OutputGrads.of(of_states, steps)
        made = walk_back(own, start, walked, given, steps, call.latent, call.noise, False)
        stoch = call.deter.new_empty(0)
        if of_stoch:
            stoch = start_stoch_grad(own, made.x[0], call.width).view_as(call.stoch)
        if not of_actor:
            return [made.deter, stoch, *(call.deter.new_empty(0) for _ in actor)]
        model = _actor(call, actor)
        grad = action_grad(own, made.x, call.width, model.actions, steps)
        grad = grad if of_action is None else grad.add_(of_action)
        return [made.deter, stoch, *model.backward(grad, traced, start, walked.deter, walked.stoch)]

    def kept(self, weights: Sequence[Tensor], actor: Sequence[Tensor], call: RolloutCall) -> list[Tensor]:
        own, wide = Weights(*weights), call.deter
        narrow, leading = own.gru_weight, (call.horizon, wide.shape[0])
        params = ActorParams.of(list(actor), call.discrete)
        actions = params.out_bias.shape[0]
        x, parts, y = (narrow.new_empty(*leading, w) for w in (own.hidden, 3 * own.deter, own.hidden))
        head = wide.new_empty(*leading, actions if call.discrete else 2 * actions)
        hidden = [narrow.new_empty(*leading, bias.shape[0]) for bias in params.trunk[1::2]]
        return [x, parts, wide.new_empty(*leading, 2), y, head, *hidden]


rssm_rollout = define_rollout("triton", _Rollout())

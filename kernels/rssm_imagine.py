"""``rssm_imagine`` by the kernels of :mod:`apv_fast.kernels.parts.imagine`; batch-first outside, steps first inside."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from apv_fast.recurrence.imagination import OUTPUTS, ImagineCall, define_imagine

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
    weight_grads,
)


def _steps(call: ImagineCall) -> Steps:
    return Steps(call.horizon, len(call.deter), batch_first=True)


def _actions(call: ImagineCall, dtype: torch.dtype) -> Tensor | None:
    """``[T, N, A]`` in the dtype of the products, rows contiguous."""
    return None if call.action is None else call.action.to(dtype).contiguous().transpose(0, 1)


class _Imagination:
    """:class:`apv_fast.recurrence.imagination.Imagination`."""

    def forward(self, weights: list[Tensor], call: ImagineCall, keep: bool) -> list[Tensor]:
        own, steps = Weights.of(weights), _steps(call)
        action = _actions(call, own.gru_weight.dtype)
        width = 0 if action is None else action.shape[-1]

        def act(t: int, room: Operands) -> None:
            if action is not None:
                room.action.copy_(action[t])

        start = Start.of(call.deter, call.stoch)
        trace = roll_out(own, start, act, width, steps, call.latent, call.noise, keep)
        return [steps.outside(x) for x in (trace if keep else trace[:OUTPUTS])]

    def backward(
        self,
        weights: list[Tensor],
        call: ImagineCall,
        trace: list[Tensor],
        grads: list[Tensor | None],
        of_stoch: bool,
        of_action: bool,
        of_weights: bool,
    ) -> list[Tensor]:
        own, steps, start = Weights.of(weights), _steps(call), Start.of(call.deter, call.stoch)
        walked = Trace(*(steps.outside(x) for x in trace))
        given = OutputGrads.of(grads, steps)
        made = walk_back(own, start, walked, given, steps, call.latent, call.noise, of_weights)

        def nothing() -> Tensor:
            return call.deter.new_empty(0)

        d_stoch = start_stoch_grad(own, made.x[0], call.width).view_as(call.stoch) if of_stoch else nothing()
        d_action = nothing()
        if call.action is not None and of_action:
            of = action_grad(own, made.x, call.width, call.action.shape[-1], steps)
            d_action = steps.outside(of).to(call.action.dtype)
        d_weights = [nothing() for _ in weights]
        if of_weights:
            d_weights = weight_grads(own, start, walked, _actions(call, own.gru_weight.dtype), made, steps)
        return [made.deter, d_stoch, d_action, *d_weights]

    def kept(self, weights: Sequence[Tensor], call: ImagineCall) -> list[Tensor]:
        own, leading = Weights(*weights), (call.deter.shape[0], call.horizon)
        x, parts, y = (own.gru_weight.new_empty(*leading, w) for w in (own.hidden, 3 * own.deter, own.hidden))
        return [x, parts, call.deter.new_empty(*leading, 2), y]


rssm_imagine = define_imagine("triton", _Imagination())

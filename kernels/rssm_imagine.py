"""``rssm_imagine`` by the kernels of :mod:`apv_fast.kernels.parts.imagine`; batch-first outside, steps first inside."""

from __future__ import annotations

from torch import Tensor

from apv_fast.ops.op import Gradients
from apv_fast.recurrence.imagination import OUTPUTS, ImagineCall, imagine_on

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
    return Steps(call.horizon, len(call.state["deter"]), batch_first=True)


def _start(call: ImagineCall) -> Start:
    return Start.of(call.state["deter"], call.state["stoch"])


def _actions(call: ImagineCall) -> Tensor | None:
    """``[T, N, A]`` in the dtype of the products, rows contiguous."""
    return None if call.action is None else call.action.to(call.weights[0].dtype).contiguous().transpose(0, 1)


def _forward(call: ImagineCall, keep: bool) -> list[Tensor]:
    steps, action = _steps(call), _actions(call)
    width = 0 if action is None else action.shape[-1]

    def act(t: int, room: Operands) -> None:
        if action is not None:
            room.action.copy_(action[t])

    trace = roll_out(Weights.of(call.weights), _start(call), act, width, steps, call.latent, call.noise, keep)
    return [steps.outside(x) for x in (trace if keep else trace[:OUTPUTS])]


def _backward(call: ImagineCall, results: list[Tensor], grads: list[Tensor | None], needs: frozenset[str]) -> Gradients:
    own, steps, start = Weights.of(call.weights), _steps(call), _start(call)
    trace = Trace(*(steps.outside(x) for x in results))
    grad_out, of_weights = OutputGrads.of(grads, steps), "weights" in needs
    inner = walk_back(own, start, trace, grad_out, steps, call.latent, call.noise, of_weights)
    out: Gradients = {"state_deter": inner.deter}
    if "state_stoch" in needs:
        out["state_stoch"] = start_stoch_grad(own, inner.x[0], call.width).view_as(call.state["stoch"])
    if call.action is not None and "action" in needs:
        of_action = action_grad(own, inner.x, call.width, call.action.shape[-1], steps)
        out["action"] = steps.outside(of_action).to(call.action.dtype)
    if of_weights:
        out["weights"] = weight_grads(own, start, trace, _actions(call), inner, steps)
    return out


def _kept(call: ImagineCall) -> list[Tensor]:
    own, wide = Weights(*call.weights), call.state["deter"]
    leading = (wide.shape[0], call.horizon)
    x, parts, y = (own.gru_weight.new_empty(*leading, w) for w in (own.hidden, 3 * own.deter, own.hidden))
    return [x, parts, wide.new_empty(*leading, 2), y]


rssm_imagine = imagine_on("triton", _forward, _backward, _kept)

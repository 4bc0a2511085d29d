"""``rssm_imagine`` in C++; the gradients of weights are products over all steps and rows afterwards.

float16 runs on the reference.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from apv_fast.cpu.parts.imagination import Tensors, Trace, empty_trace, flat, grads_of, over_steps, run, traced
from apv_fast.cpu.parts.product import product
from apv_fast.ops.op import Gradients
from apv_fast.recurrence.imagination import OUTPUTS, ImagineCall, imagine_on
from apv_fast.reference import rssm_imagine as reference
from apv_fast.types import Latent, RSSMParams, State


def _empty(call: ImagineCall) -> Trace:
    return empty_trace(call, (call.state["deter"].shape[0], call.horizon))


def _actions(call: ImagineCall) -> int:
    return 0 if call.action is None else call.action.shape[-1]


def _action(call: ImagineCall) -> Tensors:
    return {} if call.action is None else {"input_action": call.action.to(call.weights[0].dtype).contiguous()}


def _forward(call: ImagineCall, keep: bool) -> list[Tensor]:
    trace = _empty(call)
    run(False, call, traced(trace, keep) | _action(call), actions=_actions(call))
    return list(trace if keep else trace[:OUTPUTS])


def _backward(call: ImagineCall, results: list[Tensor], grads: list[Tensor | None], needs: frozenset[str]) -> Gradients:
    own, narrow, wide = Trace(*results), call.weights[0], call.state["deter"]
    inner: Tensors = {"dstart_deter": torch.zeros_like(wide, memory_format=torch.contiguous_format)}
    if "weights" in needs:
        inner |= {f"d{n}": narrow.new_empty(getattr(own, n).shape) for n in ("x", "parts", "y", "stats")}
        inner |= {f"dnorm_{n}": wide.new_zeros(3 * wide.shape[1]) for n in ("weight", "bias")}
    if "state_stoch" in needs:
        inner["dstart_stoch"] = wide.new_empty(call.state["stoch"].shape)
    if "action" in needs and call.action is not None:
        inner["daction"] = wide.new_empty(call.action.shape)
    grad_out = grads_of(("deter", "stoch", "stats"), grads)
    run(True, call, traced(own, True) | _action(call) | grad_out | inner, actions=_actions(call))
    out: Gradients = {"state_deter": inner["dstart_deter"]}
    if "state_stoch" in needs:
        out["state_stoch"] = inner["dstart_stoch"]
    if "action" in needs and call.action is not None:
        out["action"] = inner["daction"].to(call.action.dtype)
    if "weights" in needs:
        out["weights"] = _weight_grads(call, own, inner)
    return out


def _weight_grads(call: ImagineCall, trace: Trace, inner: Tensors) -> list[Tensor]:
    """Of the ten weights, one product each over all rows and steps."""
    dtype, dx, dparts = call.weights[0].dtype, inner["dx"], inner["dparts"]
    dy, dstats = flat(inner["dy"]), flat(inner["dstats"])
    img_in = torch.zeros_like(call.weights[0], memory_format=torch.contiguous_format)
    img_in[:, : call.width] = over_steps(dx, call.state["stoch"].flatten(1), trace.stoch, 1)
    if call.action is not None:
        of_action = product(flat(dx).T, flat(call.action).to(dtype))
        img_in[:, call.width : call.width + call.action.shape[-1]] = of_action
    of_deter = over_steps(dparts, call.state["deter"], trace.deter, 1)
    return [
        *(img_in, flat(dx).sum(0)),
        *(torch.cat([product(flat(dparts).T, flat(trace.x)), of_deter], 1), flat(dparts).sum(0)),
        *(inner["dnorm_weight"].to(dtype), inner["dnorm_bias"].to(dtype)),
        *(product(dy.T, flat(trace.deter).to(dtype)), dy.sum(0)),
        *(product(dstats.T, flat(trace.y)), dstats.sum(0)),
    ]


_imagine = imagine_on("cpu", _forward, _backward, lambda call: list(_empty(call)[OUTPUTS:]))


def rssm_imagine(
    params: RSSMParams, state: State, action: Tensor | None, horizon: int, latent: Latent, noise: Tensor | None
) -> State:
    """Roll the prior out; arguments and result as :func:`apv_fast.reference.rssm_imagine.rssm_imagine`, which see."""
    half = params.gru_weight.dtype == torch.float16
    function: Callable[..., State] = reference.rssm_imagine if half else _imagine
    return function(params, state, action, horizon, latent, noise)

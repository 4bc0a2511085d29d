"""``rssm_rollout`` in C++; the gradients of the actor's weights are products over all steps and rows afterwards.

float16 runs on the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from apv_fast.cpu.parts.imagination import (
    Tensors,
    Trace,
    empty_trace,
    flat,
    grads_of,
    noise_of,
    over_steps,
    run,
    traced,
)
from apv_fast.cpu.parts.product import product
from apv_fast.ops.op import Gradients
from apv_fast.recurrence.imagination import OUTPUTS, RolloutCall, rollout_on
from apv_fast.reference import rssm_rollout as reference
from apv_fast.types import State


def _empty(call: RolloutCall) -> Trace:
    return empty_trace(call, (call.horizon, call.state["deter"].shape[0]))


def _empty_actor(call: RolloutCall) -> list[Tensor]:
    """Empty actions, heads and hidden layers."""
    leading, actions = (call.horizon, call.state["deter"].shape[0]), call.actor.out_bias.shape[0]
    heads = actions if call.actor.discrete else 2 * actions
    hidden = [call.weights[0].new_empty(*leading, bias.shape[0]) for bias in call.actor.trunk[1::2]]
    return [*(call.state["deter"].new_empty(*leading, w) for w in (actions, heads)), *hidden]


def _run(backward: bool, call: RolloutCall, tensors: Tensors) -> None:
    actor = call.actor
    weight, bias = actor.out_weight, actor.out_bias
    if actor.std_weight is not None and actor.std_bias is not None:  # one product for both heads
        weight, bias = torch.cat([weight, actor.std_weight]), torch.cat([bias, actor.std_bias])
    layers = {"head_weight": weight.contiguous(), "head_bias": bias.contiguous()}
    for i, (w, b) in enumerate(zip(actor.trunk[::2], actor.trunk[1::2], strict=True)):
        layers |= {f"layer_weight{i}": w.contiguous(), f"layer_bias{i}": b.contiguous()}
    run(
        backward,
        call,
        tensors | layers | noise_of(call.action_noise, "action_noise", "action_seed"),
        actions=len(actor.out_bias),
        units=[len(b) for b in actor.trunk[1::2]],
        min_std=call.min_std,
        one_hot=actor.discrete,
    )


def _forward(call: RolloutCall, keep: bool) -> list[Tensor]:
    trace, (action, head, *hidden) = _empty(call), _empty_actor(call)
    tensors = traced(trace, keep) | {"action_trace": action}
    if keep:
        tensors |= {"head_trace": head} | {f"layer_trace{i}": x for i, x in enumerate(hidden)}
    _run(False, call, tensors)
    return [*trace[:OUTPUTS], action, *((*trace[OUTPUTS:], head, *hidden) if keep else ())]


def _backward(call: RolloutCall, results: list[Tensor], grads: list[Tensor | None], needs: frozenset[str]) -> Gradients:
    split, wide, narrow = len(Trace._fields) + 1, call.state["deter"], call.weights[0]
    own = Trace(*results[:OUTPUTS], *results[OUTPUTS + 1 : split])
    head, *hidden = results[split:]
    tensors = grads_of(("deter", "stoch", "stats", "action"), grads) | traced(own, True)
    tensors |= {"head_trace": head} | {f"layer_trace{i}": x for i, x in enumerate(hidden)}
    inner: Tensors = {"dstart_deter": torch.zeros_like(wide, memory_format=torch.contiguous_format)}
    if "state_stoch" in needs:
        inner["dstart_stoch"] = wide.new_empty(call.state["stoch"].shape)
    if "actor" in needs:
        inner["dhead"] = narrow.new_empty(head.shape)
        inner |= {f"dlayer{i}": torch.empty_like(x) for i, x in enumerate(hidden)}
    _run(True, call, tensors | inner)
    out: Gradients = {"state_deter": inner["dstart_deter"]}
    if "state_stoch" in needs:
        out["state_stoch"] = inner["dstart_stoch"]
    if "actor" in needs:
        of_hidden = [inner[f"dlayer{i}"] for i in range(len(hidden))]
        out["actor"] = _actor_grads(call, own, hidden, of_hidden, inner["dhead"])
    return out


def _actor_grads(
    call: RolloutCall, trace: Trace, hidden: list[Tensor], grads: list[Tensor], of_head: Tensor
) -> list[Tensor]:
    """Of the tensors of :meth:`ActorParams.flat`, one product each over all rows and steps."""
    features = ((call.state["stoch"].flatten(1), trace.stoch), (call.state["deter"], trace.deter))
    out = [torch.cat([over_steps(grads[0], *x, 0) for x in features], 1), flat(grads[0]).sum(0)]
    for grad, below in zip(grads[1:], hidden[:-1], strict=True):
        out += [product(flat(grad).T, flat(below)), flat(grad).sum(0)]
    d_head = flat(of_head)
    weight, bias = product(d_head.T, flat(hidden[-1])), d_head.sum(0)
    if call.actor.discrete:
        return [*out, weight, bias]
    return [*out, *(part.clone() for pair in zip(weight.chunk(2), bias.chunk(2), strict=True) for part in pair)]


_rollout = rollout_on("cpu", _forward, _backward, lambda call: [*_empty(call)[OUTPUTS:], *_empty_actor(call)[1:]])


def rssm_rollout(*fields: Any) -> tuple[State, Tensor]:
    """Arguments and result as :func:`apv_fast.reference.rssm_rollout.rssm_rollout`, which see."""
    half = fields[0].gru_weight.dtype == torch.float16
    function: Callable[..., tuple[State, Tensor]] = reference.rssm_rollout if half else _rollout
    return function(*fields)

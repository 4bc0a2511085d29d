"""``rssm_imagine`` as one opaque op around :mod:`apv_fast.kernels.imagine`; batch-first throughout."""
# mypy: allow-untyped-decorators

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apv_fast.structure import Latent, RSSMParams, State

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
    weight_grads,
)

_SCHEMA = (  # of Call, behind the weights
    "Tensor? action, Tensor deter, Tensor stoch, int horizon, int S, int C, float min_std, Tensor? noise"
)


class Call(NamedTuple):
    """Arguments of the op without the weights, in the schema's order."""

    action: Tensor | None  # [N, T, A]
    deter: Tensor  # [N, D]
    stoch: Tensor  # [N, S, C] or [N, S]
    horizon: int
    S: int
    C: int
    min_std: float
    noise: Tensor | None  # [N, T, S, C] or [N, T, S], or a seed

    @property
    def latent(self) -> Latent:
        """The kind of latent."""
        return Latent(self.S, self.C, self.min_std)

    @property
    def steps(self) -> Steps:
        """Where the steps lie."""
        return Steps(self.horizon, len(self.deter), batch_first=True)

    def actions(self, dtype: torch.dtype) -> Tensor | None:
        """``[T, N, A]`` in the dtype of the products, rows contiguous."""
        return None if self.action is None else self.action.to(dtype).contiguous().transpose(0, 1)


@torch.library.custom_op(
    "apv_fast::rssm_imagine_triton",
    mutates_args=(),
    schema=f"(Tensor[] weights, {_SCHEMA}, bool keep) -> Tensor[]",
)
def _forward(weights: list[Tensor], *rest: Any) -> list[Tensor]:
    *arguments, keep = rest
    call, own = Call(*arguments), Weights.of(weights)
    action = call.actions(own.gru_weight.dtype)
    width = 0 if action is None else action.shape[-1]
    start = Start.of(call.deter, call.stoch)

    def act(t: int, room: Operands) -> None:
        if action is not None:
            room.action.copy_(action[t])

    trace = roll_out(
        own,
        start,
        act,
        width,
        call.steps,
        call.latent,
        call.noise,
        keep,
    )
    return [call.steps.outside(x) for x in (trace if keep else trace[:OUTPUTS])]


@torch.library.custom_op(
    "apv_fast::rssm_imagine_triton_backward",
    mutates_args=(),
    schema=f"(Tensor[] weights, {_SCHEMA}, Tensor[] trace, Tensor?[] grads, bool[] needs) -> Tensor[]",
)
def _backward(weights: list[Tensor], *rest: Any) -> list[Tensor]:
    """Gradients of deter, stoch, action and the weights, the latter three empty unless in ``needs``."""
    *arguments, traces, grads, (of_stoch, of_action, of_weights) = rest
    call, own = Call(*arguments), Weights.of(weights)
    steps, start = call.steps, Start.of(call.deter, call.stoch)
    trace = Trace(*(steps.outside(x) for x in traces))
    action = call.actions(own.gru_weight.dtype)
    made = walk_back(own, start, trace, OutputGrads.of(grads, steps), steps, call.latent, call.noise, of_weights)
    width = start.stoch.shape[1]

    def nothing() -> Tensor:
        return call.deter.new_empty(0)

    d_stoch = start_stoch_grad(own, made.x[0], width).view_as(call.stoch) if of_stoch else nothing()
    d_action = nothing()
    if call.action is not None and of_action:
        d_action = steps.outside(action_grad(own, made.x, width, call.action.shape[-1], steps)).to(call.action.dtype)
    d_weights = weight_grads(own, start, trace, action, made, steps) if of_weights else [nothing() for _ in weights]
    return [made.deter, d_stoch, d_action, *d_weights]


def _fake_trace(weights: Sequence[Tensor], call: Call, keep: bool) -> list[Tensor]:
    own, wide = Weights(*weights), call.deter
    latent, leading = call.S * (call.C or 1), (wide.shape[0], call.horizon)
    outputs = [wide.new_empty(*leading, w) for w in (own.deter, latent, own.img_dist_bias.shape[0])]
    if not keep:
        return outputs
    narrow = own.gru_weight
    x, parts, y = (narrow.new_empty(*leading, w) for w in (own.hidden, 3 * own.deter, own.hidden))
    return [*outputs, x, parts, wide.new_empty(*leading, 2), y]


@_forward.register_fake
def _(weights: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    *arguments, keep = rest
    return _fake_trace(weights, Call(*arguments), keep)


@_backward.register_fake
def _(weights: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    *arguments, _, _, (of_stoch, of_action, of_weights) = rest
    call = Call(*arguments)
    wide = call.deter
    stoch = wide.new_empty(call.stoch.shape if of_stoch else 0)
    of = wide.new_empty(0) if call.action is None or not of_action else call.action.new_empty(call.action.shape)
    return [
        wide.new_empty(wide.shape),
        stoch,
        of,
        *(w.new_empty(w.shape) if of_weights else wide.new_empty(0) for w in weights),
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    weights, action, deter, stoch, horizon, S, C, min_std, noise, keep = inputs
    ctx.set_materialize_grads(False)
    ctx.numbers, ctx.count = (horizon, S, C, min_std), len(weights)
    if C and noise is None:
        ctx.mark_non_differentiable(output[1], *output[OUTPUTS:])  # a mode has no gradient
    else:
        ctx.mark_non_differentiable(*output[OUTPUTS:])
    if keep:
        ctx.save_for_backward(*weights, action, deter, stoch, noise, *output)


def _differentiate(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    weights, (action, deter, stoch, noise), trace = saved[: ctx.count], saved[ctx.count :][:4], saved[ctx.count + 4 :]
    of_weights, of_action, of_deter, of_stoch, *_ = ctx.needs_input_grad
    needs = [of_stoch, of_action, any(of_weights)]
    made = _backward(
        list(weights), action, deter, stoch, *ctx.numbers, noise, list(trace), list(grads[:OUTPUTS]), needs
    )
    d_deter, d_stoch, d_action, *d_weights = made
    return (
        d_weights if needs[2] else [None] * len(weights),
        d_action if of_action else None,
        d_deter if of_deter else None,
        d_stoch if of_stoch else None,
        *(None for _ in (*ctx.numbers, "noise", "keep")),
    )


_forward.register_autograd(_differentiate, setup_context=_save)


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether anything will ask for the way back from these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def state_of(deter: Tensor, stoch: Tensor, stats: Tensor, latent: Latent) -> State:
    """A state with DreamerV2's keys from flat latents ``[..., L]`` and statistics ``[..., M]``."""
    if latent.discrete:
        shape = (latent.stoch, latent.discrete)
        return {"deter": deter, "stoch": stoch.unflatten(-1, shape), "logit": stats.unflatten(-1, shape)}
    mean, raw = stats.chunk(2, -1)
    return {"deter": deter, "stoch": stoch, "mean": mean, "std": 2 * torch.sigmoid(raw / 2) + latent.min_std}


def rssm_imagine(
    params: RSSMParams, state: State, action: Tensor | None, horizon: int, latent: Latent, noise: Tensor | None
) -> State:
    """Roll the prior out; arguments and result as :func:`apv_fast.reference.rssm.rssm_imagine`, which see."""
    weights = list(params[: len(Weights._fields)])
    keep = wants_gradients(*weights, action, state["deter"], state["stoch"])
    deter, stoch, stats, *_ = _forward(weights, action, state["deter"], state["stoch"], horizon, *latent, noise, keep)
    return state_of(deter, stoch, stats, latent)

"""``rssm_observe`` around a core, as one opaque op: hoisted products, the recurrence, products after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from apv_fast.scan.core import Core, Trace, TraceGrads, scan_weights
from apv_fast.scan.hoist import (
    InputGrads,
    ObserveArguments,
    PriorTrace,
    core_grads,
    fake_traces,
    prior_head,
    products_after,
    scan_inputs,
    states,
)
from apv_fast.structure import Latent, RSSMParams, State

Observe = Callable[..., tuple[State, State]]
DIFFERENTIABLE = ("deter", "stoch", "stats")  # of a trace; the rest is for the backward pass alone


def observe_forward(core: Core, params: RSSMParams, arguments: ObserveArguments) -> tuple[Trace, PriorTrace]:
    """Posterior and prior of a sequence, and what the backward pass needs."""
    latent = arguments.latent
    trace = core.forward(scan_weights(params, latent), scan_inputs(params, arguments), arguments.start, latent)
    return trace, prior_head(params, trace.deter, latent, arguments.prior_noise)


def observe_backward(
    core: Core,
    params: RSSMParams,
    arguments: ObserveArguments,
    trace: Trace,
    prior: PriorTrace,
    post_grads: TraceGrads,
    prior_grads: TraceGrads,
) -> InputGrads:
    """Gradients of all arguments from those of both traces."""
    given, head = core_grads(params, arguments, trace, prior, post_grads, prior_grads)
    grads = core.backward(scan_weights(params, arguments.latent), arguments.start, trace, given, arguments.latent)
    return products_after(params, arguments, trace, grads, head)


def define_observe(name: str, core: Core) -> Observe:
    """``rssm_observe`` on ``core``, behind the opaque op ``apv_fast::rssm_observe_NAME``."""

    @torch.library.custom_op(f"apv_fast::rssm_observe_{name}", mutates_args=())
    def forward(
        params: Sequence[Tensor],
        embed: Tensor,
        is_first: Tensor,
        action: Tensor | None,
        deter: Tensor,
        stoch: Tensor,
        S: int,
        C: int,
        min_std: float,
        post_noise: Tensor | None,
        prior_noise: Tensor | None,
    ) -> list[Tensor]:
        arguments = ObserveArguments(embed, is_first, action, deter, stoch, S, C, min_std, post_noise, prior_noise)
        trace, prior = observe_forward(core, RSSMParams(*params), arguments)
        return [*trace, *prior]

    @torch.library.custom_op(f"apv_fast::rssm_observe_{name}_backward", mutates_args=())
    def backward(
        params: Sequence[Tensor],
        embed: Tensor,
        is_first: Tensor,
        action: Tensor | None,
        deter: Tensor,
        stoch: Tensor,
        S: int,
        C: int,
        min_std: float,
        post_noise: Tensor | None,
        prior_noise: Tensor | None,
        traces: Sequence[Tensor],
        grad_deter: Tensor | None,
        grad_stoch: Tensor | None,
        grad_stats: Tensor | None,
        grad_prior_stoch: Tensor | None,
        grad_prior_stats: Tensor | None,
    ) -> list[Tensor]:
        arguments = ObserveArguments(embed, is_first, action, deter, stoch, S, C, min_std, post_noise, prior_noise)
        trace, prior = split_trace(traces)
        grads = observe_backward(
            core,
            RSSMParams(*params),
            arguments,
            trace,
            prior,
            TraceGrads(grad_deter, grad_stoch, grad_stats),
            TraceGrads(None, grad_prior_stoch, grad_prior_stats),
        )
        return [*grads.params, *(grad for grad in grads[1:] if grad is not None)]

    @forward.register_fake
    def _(params: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
        return [*fake_traces(RSSMParams(*params), ObserveArguments(*arguments))]

    @backward.register_fake
    def _(params: Sequence[Tensor], *rest: Any) -> list[Tensor]:
        arguments = ObserveArguments(*rest[: len(ObserveArguments._fields)])
        like = [*params, arguments.embed, arguments.deter, arguments.stoch]
        like += [] if arguments.action is None else [arguments.action]
        return [x.new_empty(x.shape) for x in like]

    forward.register_autograd(_differentiation(backward), setup_context=_save)

    def observe(
        params: RSSMParams,
        embed: Tensor,
        is_first: Tensor,
        action: Tensor | None,
        state: State,
        latent: Latent,
        post_noise: Tensor | None,
        prior_noise: Tensor | None,
    ) -> tuple[State, State]:
        made = forward(
            list(params), embed, is_first, action, state["deter"], state["stoch"], *latent, post_noise, prior_noise
        )
        return states(*split_trace(made), latent)

    return observe


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    params, *rest = inputs
    ctx.set_materialize_grads(False)
    ctx.constants = {name: x for name, x in zip(ObserveArguments._fields, rest, strict=True) if not _is_tensor(x)}
    ctx.weights = len(params)
    tensors = [x for x in rest if _is_tensor(x)]
    ctx.traces = len(params) + len(tensors)
    ctx.save_for_backward(*params, *tensors, *output)
    names = (*Trace._fields, *(f"prior {name}" for name in PriorTrace._fields))
    ctx.mark_non_differentiable(
        *(x for name, x in zip(names, output, strict=True) if name.removeprefix("prior ") not in DIFFERENTIABLE)
    )


def _is_tensor(x: object) -> bool:
    return isinstance(x, Tensor)


def _differentiation(backward: Callable[..., list[Tensor]]) -> Callable[..., tuple[Any, ...]]:
    def differentiate(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
        saved = list(ctx.saved_tensors)
        params, tensors, traces = saved[: ctx.weights], iter(saved[ctx.weights : ctx.traces]), saved[ctx.traces :]
        values = [ctx.constants[f] if f in ctx.constants else next(tensors) for f in ObserveArguments._fields]
        arguments = ObserveArguments(*values)
        post, prior = split_trace(grads)  # type: ignore[arg-type]
        given = (post.deter, post.stoch, post.stats, prior.stoch, prior.stats)
        made = backward(params, *arguments, traces, *given)
        weights, (dembed, ddeter, dstoch, *daction) = made[: len(params)], made[len(params) :]
        of = {"embed": dembed, "deter": ddeter, "stoch": dstoch, "action": daction[0] if daction else None}
        return weights, *(of.get(name) for name in ObserveArguments._fields)

    return differentiate


def split_trace(traces: Sequence[Tensor]) -> tuple[Trace, PriorTrace]:
    """The two traces of one op's outputs."""
    split = len(Trace._fields)
    return Trace(*traces[:split]), PriorTrace(*traces[split:])

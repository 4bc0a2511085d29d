"""``rssm_observe`` around a core, as one opaque op: hoisted products, the recurrence, products after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from apv_fast.recurrence.hoisted import (
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
from apv_fast.recurrence.phases import Core, Trace, TraceGrads, scan_weights
from apv_fast.types import Latent, RSSMParams, State

Arguments = TypeVar("Arguments", bound=tuple[Any, ...])
Observe = Callable[..., tuple[State, State]]
_SCHEMA = (  # of ObserveArguments
    "Tensor embed, Tensor is_first, Tensor? action, Tensor deter, Tensor stoch, int S, int C, float min_std, "
    "Tensor? post_noise, Tensor? prior_noise"
)
DIFFERENTIABLE = ("deter", "stoch", "stats")  # of a trace; the rest is for the backward pass alone


def observe_forward(core: Core, params: RSSMParams, arguments: ObserveArguments) -> tuple[Trace, PriorTrace]:
    """Posterior and prior of a sequence, and what the backward pass needs."""
    latent = arguments.latent
    trace = core.forward(scan_weights(params, latent), scan_inputs(core, params, arguments), arguments.start, latent)
    return trace, prior_head(core, params, trace.deter, latent, arguments.prior_noise)


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
    weights, start, latent = scan_weights(params, arguments.latent), arguments.start, arguments.latent
    given, head = core_grads(core, params, arguments, trace, prior, post_grads, prior_grads)
    grads = [core.backward(weights, start, trace, given, latent)]
    del given
    return products_after(core, params, arguments, trace, grads.pop(), head)


def define_observe(name: str, core: Core) -> Observe:
    """``rssm_observe`` on ``core``, behind the opaque op ``apv_fast::rssm_observe_NAME``."""

    # Schemas in full: what torch infers from a signature with sequences differs between its versions.
    @torch.library.custom_op(
        f"apv_fast::rssm_observe_{name}", mutates_args=(), schema=f"(Tensor[] params, {_SCHEMA}) -> Tensor[]"
    )
    def forward(params: list[Tensor], *rest: Any) -> list[Tensor]:
        trace, prior = observe_forward(core, RSSMParams(*params), ObserveArguments(*rest))
        return [*trace, *prior]

    @torch.library.custom_op(
        f"apv_fast::rssm_observe_{name}_backward",
        mutates_args=(),
        schema=f"(Tensor[] params, {_SCHEMA}, Tensor[] traces, Tensor?[] grads) -> Tensor[]",
    )
    def backward(params: list[Tensor], *rest: Any) -> list[Tensor]:
        *values, traces, grads = rest
        arguments = ObserveArguments(*values)
        made = observe_backward(core, RSSMParams(*params), arguments, *split_trace(traces), *trace_grads(grads))
        return [*made.params, *(grad for grad in made[1:] if grad is not None)]

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
    save(ctx, [params], ObserveArguments(*rest), output)


def save(ctx: Any, weights: Sequence[Sequence[Tensor]], arguments: tuple[Any, ...], traces: Sequence[Tensor]) -> None:
    """Keep an op's arguments (a named tuple) and its traces, of which only outputs get gradients."""
    ctx.set_materialize_grads(False)
    ctx.weights = [len(params) for params in weights]
    ctx.plain = [None if isinstance(x, Tensor) else (x,) for x in arguments]
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    ctx.save_for_backward(*(weight for params in weights for weight in params), *tensors, *traces)
    names = (*Trace._fields, *PriorTrace._fields)
    pairs = zip(names * (len(traces) // len(names)), traces, strict=True)
    ctx.mark_non_differentiable(*(trace for name, trace in pairs if name not in DIFFERENTIABLE))


def saved(ctx: Any, kind: type[Arguments]) -> tuple[list[RSSMParams], Arguments, list[Tensor]]:
    """What :func:`save` kept: weights, arguments, traces."""
    tensors = iter(ctx.saved_tensors)
    weights = [RSSMParams(*(next(tensors) for _ in range(count))) for count in ctx.weights]
    arguments = kind(*(next(tensors) if plain is None else plain[0] for plain in ctx.plain))
    return weights, arguments, list(tensors)


def _differentiation(backward: Callable[..., list[Tensor]]) -> Callable[..., tuple[Any, ...]]:
    def differentiate(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
        (params,), arguments, traces = saved(ctx, ObserveArguments)
        made = backward(list(params), *arguments, traces, output_grads(grads))
        weights, of = made[: len(params)], dict(zip(InputGrads._fields[1:], made[len(params) :], strict=False))
        return weights, *(of.get(name) for name in ObserveArguments._fields)

    return differentiate


def output_grads(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Those of deter, stoch and stats, then of the prior's stoch and stats, out of those of one model's traces."""
    names = (*Trace._fields, *PriorTrace._fields)
    return [grad for name, grad in zip(names, grads, strict=True) if name in DIFFERENTIABLE]


def trace_grads(given: Sequence[Tensor | None]) -> tuple[TraceGrads, TraceGrads]:
    """What :func:`output_grads` gave, of posterior and prior."""
    deter, stoch, stats, prior_stoch, prior_stats = given
    return TraceGrads(deter, stoch, stats), TraceGrads(None, prior_stoch, prior_stats)


def split_trace(traces: Sequence[Tensor]) -> tuple[Trace, PriorTrace]:
    """The two traces of one op's outputs."""
    split = len(Trace._fields)
    return Trace(*traces[:split]), PriorTrace(*traces[split:])

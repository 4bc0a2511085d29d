"""``stacked_observe`` around a core, as one opaque op: two recurrences, of which the upper one sees the lower one.

In phase 4 of :mod:`apv_fast.recurrence.phases` the upper model adds what it sees of the lower one's posterior::

    y_t = elu(inputs.obs_t + link.stoch z^l_t + link.deter h^l_t + W_obs h_t)

and in the backward pass the lower model's gradients receive, before its own step t,::

    grads.deter^l_t += link.deterᵀ dy_t        grads.stoch^l_t += link.stochᵀ dy_t

with dy_t the gradient of the upper phase 4's preactivation. So the lower model's step t and the upper model's step
t - 1 (backward: the upper one's t and the lower one's t + 1) do not depend on each other and can share their barriers:
T + 1 rounds instead of 2T. A core may do that; :class:`TwoScans` makes a stacked core of any core, one scan after the
other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from apv_fast.recurrence.hoisted import (
    ObserveArguments,
    PriorTrace,
    core_grads,
    fake_traces,
    flat,
    prior_head,
    products_after,
    scan_inputs,
    states,
)
from apv_fast.recurrence.observe import output_grads, save, saved, split_trace, trace_grads
from apv_fast.recurrence.phases import (
    Core,
    ScanGrads,
    ScanInputs,
    ScanStart,
    ScanWeights,
    Trace,
    TraceGrads,
    add,
    scan_weights,
)
from apv_fast.types import Latent, RSSMParams, State


class Link(NamedTuple):
    """obs_out's columns of the upper model that see the lower one; any strides, the weights' dtype."""

    stoch: Tensor  # [H, L of the lower model]
    deter: Tensor  # [H, D of the lower model]


class Model(NamedTuple):
    """One of the two recurrences."""

    weights: ScanWeights
    start: ScanStart
    latent: Latent


class StackedCore(Protocol):
    """Both recurrences, forward and backward; see :class:`apv_fast.recurrence.phases.Core`."""

    core: Core  # of the same backend, which samples the priors

    def forward(
        self, lower: Model, upper: Model, link: Link, inputs: tuple[ScanInputs, ScanInputs]
    ) -> tuple[Trace, Trace]:
        """Walk forward; ``inputs`` of the lower and the upper model, without what the link adds."""

    def backward(
        self, lower: Model, upper: Model, link: Link, traces: tuple[Trace, Trace], grads: tuple[TraceGrads, TraceGrads]
    ) -> tuple[ScanGrads, ScanGrads]:
        """Walk back; ``grads`` without what comes through the link."""


class TwoScans:
    """The upper scan after the lower one, with the link as one product between them."""

    def __init__(self, core: Core) -> None:
        self.core = core

    def forward(
        self, lower: Model, upper: Model, link: Link, inputs: tuple[ScanInputs, ScanInputs]
    ) -> tuple[Trace, Trace]:
        """See :class:`StackedCore`."""
        below = self.core.forward(lower.weights, inputs[0], lower.start, lower.latent)
        dtype = link.deter.dtype
        product, shape = self.core.product, inputs[1].obs.shape
        seen = product(flat(below.stoch.to(dtype)), link.stoch.T) + product(flat(below.deter.to(dtype)), link.deter.T)
        above = inputs[1]._replace(obs=inputs[1].obs + seen.view(shape))
        return below, self.core.forward(upper.weights, above, upper.start, upper.latent)

    def backward(
        self, lower: Model, upper: Model, link: Link, traces: tuple[Trace, Trace], grads: tuple[TraceGrads, TraceGrads]
    ) -> tuple[ScanGrads, ScanGrads]:
        """See :class:`StackedCore`."""
        above = self.core.backward(upper.weights, upper.start, traces[1], grads[1], upper.latent)
        product, wide, dy = self.core.product, lower.start.deter.dtype, flat(above.y)
        deter = add(grads[0].deter, product(dy, link.deter).to(wide).view_as(traces[0].deter))
        stoch = grads[0].stoch
        if not (lower.latent.discrete and lower.start.noise is None):  # modes have no gradient
            stoch = add(stoch, product(dy, link.stoch).to(wide).view_as(traces[0].stoch))
        given = TraceGrads(deter, stoch, grads[0].stats)
        return self.core.backward(lower.weights, lower.start, traces[0], given, lower.latent), above


class StackArguments(NamedTuple):
    """The checked arguments of ``stacked_observe`` without the weights; the order of the opaque op's schema."""

    embed: Tensor  # [B, T, E]
    is_first: Tensor  # [B, T] bool
    action: Tensor  # [B, T, A]
    af_deter: Tensor
    af_stoch: Tensor
    deter: Tensor
    stoch: Tensor
    af_S: int
    af_C: int
    af_min_std: float
    S: int
    C: int
    min_std: float
    af_post_noise: Tensor | None
    af_prior_noise: Tensor | None
    post_noise: Tensor | None
    prior_noise: Tensor | None
    concat_embed: bool

    @property
    def lower(self) -> ObserveArguments:
        """Of the action-free model."""
        latent, noise = (self.af_S, self.af_C, self.af_min_std), (self.af_post_noise, self.af_prior_noise)
        return ObserveArguments(self.embed, self.is_first, None, self.af_deter, self.af_stoch, *latent, *noise)

    @property
    def upper(self) -> ObserveArguments:
        """Of the action-conditional model, whose embedding is only what the lower one does not give it."""
        embed = self.embed if self.concat_embed else self.embed[..., :0]
        latent, noise = (self.S, self.C, self.min_std), (self.post_noise, self.prior_noise)
        return ObserveArguments(embed, self.is_first, self.action, self.deter, self.stoch, *latent, *noise)


def _model(params: RSSMParams, arguments: ObserveArguments) -> Model:
    return Model(scan_weights(params, arguments.latent), arguments.start, arguments.latent)


def _link(params: RSSMParams, arguments: StackArguments) -> Link:
    upper = arguments.upper
    begin = upper.deter.shape[1] + upper.embed.shape[-1]
    middle = begin + arguments.af_S * (arguments.af_C or 1)
    return Link(params.obs_out_weight[:, begin:middle], params.obs_out_weight[:, middle:])


def _forward(core: StackedCore, params: tuple[RSSMParams, RSSMParams], arguments: StackArguments) -> list[Tensor]:
    both = arguments.lower, arguments.upper
    models = _model(params[0], both[0]), _model(params[1], both[1])
    inputs = scan_inputs(core.core, params[0], both[0]), scan_inputs(core.core, params[1], both[1])
    traces = core.forward(*models, _link(params[1], arguments), inputs)
    made: list[Tensor] = []
    for own, mine, trace in zip(params, both, traces, strict=True):
        made += [*trace, *prior_head(core.core, own, trace.deter, mine.latent, mine.prior_noise)]
    return made


def _backward(
    core: StackedCore,
    params: tuple[RSSMParams, RSSMParams],
    arguments: StackArguments,
    traces: Sequence[tuple[Trace, PriorTrace]],
    grads: Sequence[tuple[TraceGrads, TraceGrads]],
) -> list[Tensor]:
    """Gradients of both models' weights, then of the tensors among the arguments that have one, in their order."""
    both = arguments.lower, arguments.upper
    models = _model(params[0], both[0]), _model(params[1], both[1])
    (below, _), (above, _) = traces
    af_given, af_head = core_grads(core.core, params[0], both[0], *traces[0], *grads[0])
    given, head = core_grads(core.core, params[1], both[1], *traces[1], *grads[1])
    made = list(core.backward(*models, _link(params[1], arguments), (below, above), (af_given, given)))
    del af_given, given
    seen = below.stoch, below.deter
    upper = products_after(core.core, params[1], both[1], above, made.pop(), head, seen)
    lower = products_after(core.core, params[0], both[0], below, made.pop(), af_head)
    embed = lower.embed
    if arguments.concat_embed:
        embed = embed + upper.embed
    assert upper.action is not None
    states_ = (lower.deter, lower.stoch, upper.deter, upper.stoch)
    return [*lower.params, *upper.params, embed, upper.action, *states_]


Observe = Callable[..., tuple[State, State, State, State]]
_SCHEMA = (  # of StackArguments
    "Tensor embed, Tensor is_first, Tensor action, Tensor af_deter, Tensor af_stoch, Tensor deter, Tensor stoch, "
    "int af_S, int af_C, float af_min_std, int S, int C, float min_std, Tensor? af_post_noise, Tensor? af_prior_noise, "
    "Tensor? post_noise, Tensor? prior_noise, bool concat_embed"
)
_GRADS = 5  # of one model's outputs, see output_grads
_WITH_GRADIENT = ("embed", "action", "af_deter", "af_stoch", "deter", "stoch")  # what _backward gives after the weights


def _split(traces: Sequence[Tensor]) -> list[tuple[Trace, PriorTrace]]:
    half = len(traces) // 2
    return [split_trace(traces[:half]), split_trace(traces[half:])]


def define_stacked(name: str, core: StackedCore) -> Observe:
    """``stacked_observe`` on ``core``, behind the opaque op ``apv_fast::stacked_observe_NAME``."""

    @torch.library.custom_op(
        f"apv_fast::stacked_observe_{name}",
        mutates_args=(),
        schema=f"(Tensor[] af_params, Tensor[] params, {_SCHEMA}) -> Tensor[]",
    )
    def forward(af_params: list[Tensor], params: list[Tensor], *rest: Any) -> list[Tensor]:
        return _forward(core, (RSSMParams(*af_params), RSSMParams(*params)), StackArguments(*rest))

    @torch.library.custom_op(
        f"apv_fast::stacked_observe_{name}_backward",
        mutates_args=(),
        schema=f"(Tensor[] af_params, Tensor[] params, {_SCHEMA}, Tensor[] traces, Tensor?[] grads) -> Tensor[]",
    )
    def backward(af_params: list[Tensor], params: list[Tensor], *rest: Any) -> list[Tensor]:
        *values, traces, grads = rest
        weights = RSSMParams(*af_params), RSSMParams(*params)
        both = trace_grads(grads[:_GRADS]), trace_grads(grads[_GRADS:])
        return _backward(core, weights, StackArguments(*values), _split(traces), both)

    @forward.register_fake
    def _(af_params: Sequence[Tensor], params: Sequence[Tensor], *rest: Any) -> list[Tensor]:
        arguments = StackArguments(*rest)
        lower = fake_traces(RSSMParams(*af_params), arguments.lower)
        return [*lower, *fake_traces(RSSMParams(*params), arguments.upper)]

    @backward.register_fake
    def _(af_params: Sequence[Tensor], params: Sequence[Tensor], *rest: Any) -> list[Tensor]:
        arguments = StackArguments(*rest[: len(StackArguments._fields)])._asdict()
        like = [*af_params, *params, *(arguments[name] for name in _WITH_GRADIENT)]
        return [x.new_empty(x.shape) for x in like]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        af_params, params, *rest = inputs
        save(ctx, [af_params, params], StackArguments(*rest), output)

    def differentiate(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
        (af_params, params), arguments, traces = saved(ctx, StackArguments)
        half = len(grads) // 2
        given = [*output_grads(grads[:half]), *output_grads(grads[half:])]
        made = backward(list(af_params), list(params), *arguments, traces, given)
        middle, end = len(af_params), len(af_params) + len(params)
        of = dict(zip(_WITH_GRADIENT, made[end:], strict=True))
        return made[:middle], made[middle:end], *(of.get(field) for field in StackArguments._fields)

    forward.register_autograd(differentiate, setup_context=setup)

    def observe(
        af_params: RSSMParams,
        params: RSSMParams,
        embed: Tensor,
        is_first: Tensor,
        action: Tensor,
        af_state: State,
        state: State,
        af_latent: Latent,
        latent: Latent,
        af_noise: tuple[Tensor | None, Tensor | None],
        noise: tuple[Tensor | None, Tensor | None],
        concat_embed: bool,
    ) -> tuple[State, State, State, State]:
        made = forward(
            *(list(af_params), list(params), embed, is_first, action, af_state["deter"], af_state["stoch"]),
            *(state["deter"], state["stoch"], *af_latent, *latent, *af_noise, *noise, concat_embed),
        )
        lower, upper = _split(made)
        return *states(*lower, af_latent), *states(*upper, latent)

    return observe

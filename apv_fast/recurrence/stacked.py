"""``stacked_observe`` around a backend, as one opaque op: two recurrences, of which the upper one sees the lower one.

In phase 4 of :mod:`apv_fast.recurrence.phases` the upper model adds what it sees of the lower one's posterior::

    y_t = elu(inputs.obs_t + link.stoch z^l_t + link.deter h^l_t + W_obs h_t)

and in the backward pass the lower model's gradients receive, before its own step t,::

    grads.deter^l_t += link.deterᵀ dy_t        grads.stoch^l_t += link.stochᵀ dy_t

with dy_t the gradient of the upper phase 4's preactivation. So the lower model's step t and the upper model's step
t - 1 (backward: the upper one's t and the lower one's t + 1) do not depend on each other and can share their barriers:
T + 1 rounds instead of 2T. A backend may do that; :class:`TwoScans` takes one scan after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from apv_fast.ops.op import Gradients, Kernel
from apv_fast.ops.rssm_observe import RssmObserve
from apv_fast.ops.stacked_observe import StackedObserve
from apv_fast.recurrence import hoisted
from apv_fast.recurrence.hoisted import PriorTrace, flat
from apv_fast.recurrence.phases import (
    ScanBackend,
    ScanGrads,
    ScanInputs,
    ScanStart,
    ScanWeights,
    Trace,
    TraceGrads,
    add,
    scan_weights,
)
from apv_fast.types import Latent, State


class Link(NamedTuple):
    """obs_out's columns of the upper model that see the lower one; any strides, the weights' dtype."""

    stoch: Tensor  # [H, L of the lower model]
    deter: Tensor  # [H, D of the lower model]


class Model(NamedTuple):
    """One of the two recurrences."""

    weights: ScanWeights
    start: ScanStart
    latent: Latent


class StackedBackend(Protocol):
    """Both recurrences, forward and backward; see :class:`apv_fast.recurrence.phases.ScanBackend`."""

    scan: ScanBackend  # of the same backend, which samples the priors

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

    def __init__(self, scan: ScanBackend) -> None:
        self.scan = scan

    def forward(
        self, lower: Model, upper: Model, link: Link, inputs: tuple[ScanInputs, ScanInputs]
    ) -> tuple[Trace, Trace]:
        """See :class:`StackedBackend`."""
        below = self.scan.forward(lower.weights, inputs[0], lower.start, lower.latent)
        dtype = link.deter.dtype
        product, shape = self.scan.product, inputs[1].obs.shape
        seen = product(flat(below.stoch.to(dtype)), link.stoch.T) + product(flat(below.deter.to(dtype)), link.deter.T)
        above = inputs[1]._replace(obs=inputs[1].obs + seen.view(shape))
        return below, self.scan.forward(upper.weights, above, upper.start, upper.latent)

    def backward(
        self, lower: Model, upper: Model, link: Link, traces: tuple[Trace, Trace], grads: tuple[TraceGrads, TraceGrads]
    ) -> tuple[ScanGrads, ScanGrads]:
        """See :class:`StackedBackend`."""
        above = self.scan.backward(upper.weights, upper.start, traces[1], grads[1], upper.latent)
        product, wide, dy = self.scan.product, lower.start.deter.dtype, flat(above.y)
        deter = add(grads[0].deter, product(dy, link.deter).to(wide).view_as(traces[0].deter))
        stoch = grads[0].stoch
        if not (lower.latent.discrete and lower.start.noise is None):  # modes have no gradient
            stoch = add(stoch, product(dy, link.stoch).to(wide).view_as(traces[0].stoch))
        grad_out = TraceGrads(deter, stoch, grads[0].stats)
        return self.scan.backward(lower.weights, lower.start, traces[0], grad_out, lower.latent), above


def _model(call: RssmObserve) -> Model:
    return Model(scan_weights(call.params, call.latent), hoisted.start_of(call), call.latent)


def _link(call: StackedObserve) -> Link:
    weight, upper, latent = call.params.obs_out_weight, call.upper, call.af_latent
    begin = call.params.img_out_weight.shape[1] + upper.embed.shape[-1]
    middle = begin + latent.stoch * (latent.discrete or 1)
    return Link(weight[:, begin:middle], weight[:, middle:])


Observe = Callable[..., tuple[State, State, State, State]]


def stacked_on(name: str, backend: StackedBackend) -> Observe:
    """``stacked_observe`` of the backend ``name``, which has these recurrences.

    Outputs and what is kept are those of the lower model, then of the upper one.
    """
    count = hoisted.COUNT

    def forward(call: StackedObserve, keep: bool) -> list[Tensor]:
        both = call.lower, call.upper
        lower, upper = (hoisted.scan_inputs(backend.scan, own) for own in both)
        traces = backend.forward(_model(both[0]), _model(both[1]), _link(call), (lower, upper))
        priors = [
            hoisted.prior_head(backend.scan, own.params, trace.deter, own.latent, own.prior_noise)
            for own, trace in zip(both, traces, strict=True)
        ]
        return _results(list(zip(traces, priors, strict=True)), keep)

    def backward(
        call: StackedObserve, results: list[Tensor], grads: list[Tensor | None], needs: frozenset[str]
    ) -> Gradients:
        both, kept = (call.lower, call.upper), results[2 * count :]
        half = len(kept) // 2
        below, af_prior = hoisted.traces_of(results[:count], kept[:half])
        above, prior = hoisted.traces_of(results[count : 2 * count], kept[half:])
        af_grad_out, af_head = hoisted.grads_out(
            backend.scan, both[0], below, af_prior, *hoisted.trace_grads(grads[:count])
        )
        grad_out, head = hoisted.grads_out(backend.scan, both[1], above, prior, *hoisted.trace_grads(grads[count:]))
        inner = list(
            backend.backward(_model(both[0]), _model(both[1]), _link(call), (below, above), (af_grad_out, grad_out))
        )
        del af_grad_out, grad_out
        upper = hoisted.products_after(backend.scan, both[1], above, inner.pop(), head, (below.stoch, below.deter))
        lower = hoisted.products_after(backend.scan, both[0], below, inner.pop(), af_head)
        return {
            "af_params": lower.params,
            "params": upper.params,
            "embed": lower.embed + upper.embed if call.concat_embed else lower.embed,
            "action": upper.action,
            "af_state_deter": lower.state_deter,
            "af_state_stoch": lower.state_stoch,
            "state_deter": upper.state_deter,
            "state_stoch": upper.state_stoch,
        }

    def fake(call: StackedObserve, keep: bool) -> list[Tensor]:
        return _results([hoisted.like_traces(call.lower), hoisted.like_traces(call.upper)], keep)

    def constant(call: StackedObserve) -> list[int]:
        return [*hoisted.constants_of(call.lower), *(count + i for i in hoisted.constants_of(call.upper))]

    kernel = Kernel(
        f"stacked_observe_{name}",
        StackedObserve,
        outputs=2 * count,
        forward=forward,
        backward=backward,
        fake=fake,
        constant=constant,
    )

    def stacked_observe(*fields: Any) -> tuple[State, State, State, State]:
        call, out = StackedObserve(*fields), kernel(*fields)
        lower, upper = hoisted.states_of(out[:count], call.af_latent), hoisted.states_of(out[count:], call.latent)
        return *lower, *upper

    return stacked_observe


def _results(traces: list[tuple[Trace, PriorTrace]], keep: bool) -> list[Tensor]:
    outputs = [x for pair in traces for x in hoisted.outputs_of(*pair)]
    return outputs + ([x for pair in traces for x in hoisted.kept_of(*pair)] if keep else [])

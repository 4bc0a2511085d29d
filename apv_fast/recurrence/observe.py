"""``rssm_observe`` around a recurrence: products before it, the recurrence, products after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from apv_fast.ops.op import Gradients, Kernel
from apv_fast.ops.rssm_observe import RssmObserve
from apv_fast.recurrence import hoisted
from apv_fast.recurrence.phases import ScanBackend, scan_weights
from apv_fast.types import State

Observe = Callable[..., tuple[State, State]]


def observe_on(name: str, backend: ScanBackend) -> Observe:
    """``rssm_observe`` of the backend ``name``, which has this recurrence."""

    def forward(call: RssmObserve, keep: bool) -> list[Tensor]:
        weights, start = scan_weights(call.params, call.latent), hoisted.start_of(call)
        trace = backend.forward(weights, hoisted.scan_inputs(backend, call), start, call.latent)
        prior = hoisted.prior_head(backend, call.params, trace.deter, call.latent, call.prior_noise)
        return hoisted.outputs_of(trace, prior) + (hoisted.kept_of(trace, prior) if keep else [])

    def backward(
        call: RssmObserve, results: list[Tensor], grads: list[Tensor | None], needs: frozenset[str]
    ) -> Gradients:
        trace, prior = hoisted.traces_of(results[: hoisted.COUNT], results[hoisted.COUNT :])
        grad_out, head = hoisted.grads_out(backend, call, trace, prior, *hoisted.trace_grads(grads))
        weights, start = scan_weights(call.params, call.latent), hoisted.start_of(call)
        inner = [backend.backward(weights, start, trace, grad_out, call.latent)]
        del grad_out
        return hoisted.products_after(backend, call, trace, inner.pop(), head)._asdict()

    def fake(call: RssmObserve, keep: bool) -> list[Tensor]:
        traces = hoisted.like_traces(call)
        return hoisted.outputs_of(*traces) + (hoisted.kept_of(*traces) if keep else [])

    kernel = Kernel(
        f"rssm_observe_{name}",
        RssmObserve,
        outputs=hoisted.COUNT,
        forward=forward,
        backward=backward,
        fake=fake,
        constant=hoisted.constants_of,
    )

    def rssm_observe(*fields: Any) -> tuple[State, State]:
        return hoisted.states_of(kernel(*fields), RssmObserve(*fields).latent)

    return rssm_observe

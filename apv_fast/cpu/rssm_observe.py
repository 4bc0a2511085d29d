"""``rssm_observe`` in C++: ``csrc/cpu/rssm_observe/``, whole recurrences in one call each way."""

from __future__ import annotations

import torch
from torch import Tensor

from apv_fast import _C
from apv_fast.cpu.parts.call import how
from apv_fast.cpu.parts.latent import sample, sample_backward
from apv_fast.cpu.parts.product import dense, elu_backward, product, weight_gradient
from apv_fast.recurrence.observe import observe_on
from apv_fast.recurrence.phases import (
    Before,
    ScanGrads,
    ScanInputs,
    ScanStart,
    ScanWeights,
    Seen,
    TorchProducts,
    Trace,
    TraceGrads,
    empty_trace,
)
from apv_fast.types import Latent


class CpuScan(TorchProducts):
    """:class:`apv_fast.recurrence.phases.ScanBackend` of float32, float64 or bfloat16 weights."""

    product = staticmethod(product)
    dense = staticmethod(dense)
    sample = staticmethod(sample)
    sample_backward = staticmethod(sample_backward)

    def elu_backward(self, grad: Tensor, y: Tensor) -> Tensor:
        """See :class:`apv_fast.recurrence.phases.TorchProducts`."""
        return elu_backward(grad, y)[0]

    def weight_gradient(self, grad: Tensor, seen: Seen, columns: int) -> tuple[Tensor, Tensor]:
        """See :class:`apv_fast.recurrence.phases.TorchProducts`."""
        one_hot = any(isinstance(part, Before) and part.one_hot for part in seen)
        if grad.dtype == torch.float32 or (one_hot and grad.dtype == torch.bfloat16):
            return weight_gradient(grad, seen, columns)
        return super().weight_gradient(grad, seen, columns)

    def forward(self, weights: ScanWeights, inputs: ScanInputs, start: ScanStart, latent: Latent) -> Trace:
        """See :class:`apv_fast.recurrence.phases.ScanBackend`."""
        trace = empty_trace(weights, start, latent)
        _run(False, weights, start, trace, latent, input_x=inputs.x.contiguous(), input_obs=inputs.obs.contiguous())
        return trace

    def backward(
        self, weights: ScanWeights, start: ScanStart, trace: Trace, grads: TraceGrads, latent: Latent
    ) -> ScanGrads:
        """See :class:`apv_fast.recurrence.phases.ScanBackend`."""
        grad_out = {f"grad_{name}": x.contiguous() for name, x in grads._asdict().items() if x is not None}
        norm = (start.deter.new_zeros(len(weights.norm_weight)) for _ in range(2))  # no rows: no sum
        grad_in = ScanGrads(
            torch.empty_like(trace.x),
            trace.x.new_empty(trace.parts.shape),
            torch.empty_like(trace.y),
            trace.x.new_empty(trace.stats.shape),
            torch.empty_like(start.deter),
            *norm,
        )
        of = {f"d{name}": x for name, x in grad_in._asdict().items()}
        of["dstart"] = of.pop("ddeter")
        _run(True, weights, start, trace, latent, **grad_out, **of)
        return grad_in


def _run(
    backward: bool, weights: ScanWeights, start: ScanStart, trace: Trace, latent: Latent, **tensors: Tensor
) -> None:
    """One direction, if there is anything to do; ``tensors`` by their names in ``csrc/cpu/rssm_observe/``."""
    batch, length, hidden = trace.x.shape
    if batch == 0:
        return
    tensors |= {f"{name}_trace": x for name, x in trace._asdict().items()}
    vectors = (weights.gru_bias, weights.norm_weight, weights.norm_bias, weights.dist_bias)
    names = ("gru_bias", "norm_weight", "norm_bias", "dist_bias")
    tensors |= {name: x.contiguous() for name, x in zip(names, vectors, strict=True)}
    tensors |= {"keep": start.keep.contiguous(), "start": start.deter.contiguous()}
    if start.noise is not None:
        name = "noise" if start.noise.is_floating_point() else "seed"
        tensors[name] = start.noise.contiguous()
    matrices = (weights.stoch, weights.gru, weights.obs, weights.dist)
    _C.rssm_scan(
        backward=backward,
        sizes=(batch, length, start.deter.shape[1], hidden, latent.stoch, latent.discrete),
        min_std=latent.min_std,
        weights=[(x.data_ptr(), *x.shape, *x.stride()) for x in matrices],
        addresses={name: x.data_ptr() for name, x in tensors.items()},
        **how(trace.x.dtype),
    )


scan = CpuScan()
rssm_observe = observe_on("cpu", scan)


def obstacle(tensor: Tensor, **_: int) -> str:
    """Why scans with weights like ``tensor`` cannot run here; empty if they can."""
    return "its scan does not take torch.float16" if tensor.dtype == torch.float16 else ""

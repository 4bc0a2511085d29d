"""The recurrence on the CUDA library: a cooperative launch for up to 64 rows and all T steps, forward and backward."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from apv_fast.backend import BackendError
from apv_fast.cuda.parts.library import Library, Matrix, Sample, Scan
from apv_fast.recurrence.phases import (
    ScanGrads,
    ScanInputs,
    ScanStart,
    ScanWeights,
    TorchProducts,
    Trace,
    TraceGrads,
    empty_trace,
)
from apv_fast.types import Latent

MAX_ROWS = 64  # of one launch, csrc/cuda/layout.h


def _address(x: Tensor | None, row: int = 0) -> int | None:
    return None if x is None else (x[row:] if row else x).data_ptr()


def _noise(noise: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The seed, if that is what the noise is, and the noise, if it is given."""
    if noise is None or not noise.is_floating_point():
        return noise, None
    return None, noise.contiguous()


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


class CudaScan(TorchProducts):
    """:class:`apv_fast.recurrence.phases.ScanBackend` of bfloat16 weights; the library is loaded when first used."""

    def __init__(self, library: Callable[[], Library]) -> None:
        self.library = library
        self._planned = functools.cache(self._plan_for)

    def obstacle(self, device: torch.device, batch: int, deter: int, hidden: int, latent: Latent) -> str:
        """Why scans of these sizes do not fit a device; empty if they do."""
        rows = int(min(batch, MAX_ROWS))  # torch.compile's may be symbolic
        try:
            for direction in ("forward", "backward"):
                self._planned(direction, device, rows, int(deter), int(hidden), latent.stoch, latent.discrete)
        except BackendError as error:
            return str(error).removeprefix("backend 'cuda' cannot run ")
        return ""

    def forward(self, weights: ScanWeights, inputs: ScanInputs, start: ScanStart, latent: Latent) -> Trace:
        """See :class:`apv_fast.recurrence.phases.ScanBackend`."""
        trace = empty_trace(weights, start, latent)
        inputs = ScanInputs(*(x.contiguous() for x in inputs))
        for scan, row in self._launches("forward", weights, start, trace, latent):
            scan.input_x, scan.input_obs = (_address(x, row) for x in inputs)
        return trace

    def backward(
        self, weights: ScanWeights, start: ScanStart, trace: Trace, grads: TraceGrads, latent: Latent
    ) -> ScanGrads:
        """See :class:`apv_fast.recurrence.phases.ScanBackend`."""
        grad_out = [x if x is None else x.contiguous() for x in grads]
        empty = start.deter.new_empty if len(start.deter) else start.deter.new_zeros  # no rows: no launch
        norm = [empty(len(weights.norm_weight)) for _ in range(2)]
        grad_in = ScanGrads(
            torch.empty_like(trace.x),
            trace.x.new_empty(trace.parts.shape),
            torch.empty_like(trace.y),
            trace.x.new_empty(trace.stats.shape),
            torch.empty_like(start.deter),
            *norm,
        )
        for scan, row in self._launches("backward", weights, start, trace, latent):
            scan.grad_deter, scan.grad_stoch, scan.grad_stats = (_address(x, row) for x in grad_out)
            scan.dx, scan.dparts, scan.dy, scan.dstats, scan.dstart = (_address(x, row) for x in grad_in[:5])
            scan.dnorm_weight, scan.dnorm_bias = (_address(x) for x in norm)
            scan.accumulate = row > 0
        return grad_in

    def sample(self, stats: Tensor, noise: Tensor | None, latent: Latent) -> Tensor:
        """See :class:`apv_fast.recurrence.phases.ScanBackend`."""
        out = stats.new_empty(*stats.shape[:-1], latent.stoch * (latent.discrete or 1))
        self._sample(stats, noise, latent, sample=out)
        return out

    def sample_backward(
        self, grad: Tensor, stats: Tensor, noise: Tensor | None, latent: Latent, sampled: bool
    ) -> Tensor | None:
        """See :class:`apv_fast.recurrence.phases.ScanBackend`."""
        if latent.discrete and not sampled:
            return None
        grad_in = torch.empty_like(stats, memory_format=torch.contiguous_format)
        self._sample(stats, noise, latent, grad=grad.contiguous(), dstats=grad_in)
        return grad_in

    def _sample(self, stats: Tensor, noise: Tensor | None, latent: Latent, **tensors: Tensor) -> None:
        stats, (seed, fixed) = stats.contiguous(), _noise(noise)
        addresses = {name: _address(x) for name, x in (tensors | {"stats": stats}).items()}
        rows = stats.shape[:-1].numel()
        if rows == 0:
            return
        sample = Sample(rows, *latent, seed=_address(seed), noise=_address(fixed), **addresses)
        with _on(stats):
            if reason := self.library().sample(sample, "grad" in tensors, _stream(stats)):
                raise RuntimeError(f"the CUDA kernel that samples {rows} priors failed: {reason}")

    def _plan_for(
        self, direction: str, device: torch.device, rows: int, deter: int, hidden: int, stoch: int, discrete: int
    ) -> tuple[int, int, int]:
        scan = Scan(batch=rows, length=1, deter=deter, hidden=hidden, stoch=stoch, discrete=discrete)
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            if reason := self.library().plan(direction, scan):
                raise BackendError(f"backend 'cuda' cannot run a {direction} scan of these sizes: {reason}")
        return scan.blocks, scan.shared_bytes, scan.workspace_bytes

    def _launches(
        self, direction: str, weights: ScanWeights, start: ScanStart, trace: Trace, latent: Latent
    ) -> Iterator[tuple[Scan, int]]:
        """A description for every 64 rows and its first row, launched when the caller has filled in the rest."""
        matrices = [Matrix.of(x) for x in (weights.stoch, weights.gru, weights.obs, weights.dist)]
        vectors = [
            x.contiguous() for x in (weights.gru_bias, weights.norm_weight, weights.norm_bias, weights.dist_bias)
        ]
        keep, first, (seed, fixed) = start.keep.contiguous(), start.deter.contiguous(), _noise(start.noise)
        batch, length, hidden = trace.x.shape
        workspace = None
        with _on(trace.x):
            for row in range(0, batch, MAX_ROWS):
                rows, deter = min(batch - row, MAX_ROWS), first.shape[1]
                plan = self._planned(direction, trace.x.device, rows, deter, hidden, latent.stoch, latent.discrete)
                if workspace is None or workspace.numel() < plan[2]:
                    workspace = torch.empty(plan[2], dtype=torch.uint8, device=trace.x.device)
                sizes = (rows, length, deter, hidden, latent.stoch, latent.discrete, row)
                inputs = (None, None, _address(keep, row), _address(first, row), _address(fixed, row), _address(seed))
                scan = Scan(*sizes, latent.min_std, *plan, *matrices, *(_address(x) for x in vectors), *inputs)
                for name, x in zip(("deter", "stoch", "stats", "x", "parts", "norm", "y"), trace, strict=True):
                    setattr(scan, f"{name}_trace", _address(x, row))
                scan.workspace = workspace.data_ptr()
                yield scan, row
                if reason := self.library().launch(direction, scan, _stream(trace.x)):
                    raise RuntimeError(f"the CUDA {direction} scan of {rows} rows failed: {reason}")

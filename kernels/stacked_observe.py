"""``stacked_observe`` in Triton: both models' recurrences in one launch, as a wavefront that shares its barriers.

Round r of the forward pass is step r of the lower model and step r - 1 of the upper one, phase by phase: T + 1 rounds
of five barriers instead of 2T. The upper model's phase 4 reads the lower one's h and sample of its own step straight
from the lower one's scratch: h_{r-1} is still there beside h_r, since it is kept by the parity of the step, and the
sample is only replaced in phase 5. Backward, round r is the upper model's step T - 1 - r and the lower one's step
T - r, which reads the dy that the upper one left a round ago.

The lower model's tiles go to the first programs and the upper one's to the last, so that phases with few tiles overlap.
Where a program has tiles of both models, the two use the same shared memory, one after the other: a barrier of the
program lies between them.
"""
# Kernels are Triton, not Python.
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from apv_fast.recurrence.phases import ScanBackend, ScanGrads, ScanInputs, Trace, TraceGrads, empty_trace
from apv_fast.recurrence.stacked import Link, Model, stacked_on

from . import rssm_observe
from .parts.grid import grid_barrier
from .parts.rssm_backward import backward_phase
from .parts.rssm_forward import forward_phase
from .parts.scan_arguments import Device, LinkBackward, LinkForward, Shape, stacked_registers
from .rssm_observe import PHASES, TritonScan, packed, scan_grads


@triton.jit
def _forward_round(PHASE: tl.constexpr, r, B, T, lower, upper, link, zl: tl.constexpr, zu: tl.constexpr):
    """One phase of the lower model's step r and the upper model's step r - 1."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    if r < T:
        forward_phase(PHASE, pid, programs, r, B, T, lower, zl, None, None)
    tl.debug_barrier()
    if r > 0:
        forward_phase(PHASE, programs - 1 - pid, programs, r - 1, B, T, upper, zu, link, zl)


@triton.jit
def _backward_round(PHASE: tl.constexpr, r, B, T, lower, upper, link, zl: tl.constexpr, zu: tl.constexpr):
    """One phase of the upper model's step T - 1 - r and the lower model's step T - r."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    if r > 0:
        backward_phase(PHASE, pid, programs, T - r, B, T, lower, zl, link, zu)
    tl.debug_barrier()
    if r < T:
        backward_phase(PHASE, programs - 1 - pid, programs, T - 1 - r, B, T, upper, zu, None, None)


@triton.jit(do_not_specialize=["B", "T"])
def forward_kernel(counter, B, T, lower, upper, link, zl: tl.constexpr, zu: tl.constexpr):
    """All rounds in one cooperative launch; ``counter`` is an int32 zero."""
    for r in range(T + 1):
        for phase in tl.static_range(1, PHASES + 1):
            _forward_round(phase, r, B, T, lower, upper, link, zl, zu)
            grid_barrier(counter, tl.num_programs(0) * (PHASES * r + phase))


@triton.jit(do_not_specialize=["r", "B", "T"])
def forward_phase_kernel(r, B, T, lower, upper, link, zl: tl.constexpr, zu: tl.constexpr, PHASE: tl.constexpr):
    """One phase of one round."""
    _forward_round(PHASE, r, B, T, lower, upper, link, zl, zu)


@triton.jit(do_not_specialize=["B", "T"])
def backward_kernel(counter, B, T, lower, upper, link, zl: tl.constexpr, zu: tl.constexpr):
    """All rounds in one cooperative launch; ``counter`` is an int32 zero."""
    for r in range(T + 1):
        for phase in tl.static_range(1, PHASES + 1):
            _backward_round(phase, r, B, T, lower, upper, link, zl, zu)
            grid_barrier(counter, tl.num_programs(0) * (PHASES * r + phase))


@triton.jit(do_not_specialize=["r", "B", "T"])
def backward_phase_kernel(r, B, T, lower, upper, link, zl: tl.constexpr, zu: tl.constexpr, PHASE: tl.constexpr):
    """One phase of one round."""
    _backward_round(PHASE, r, B, T, lower, upper, link, zl, zu)


def _shapes(lower: Model, upper: Model) -> tuple[Device, Shape, Shape]:
    """The device, and both models' tiles."""
    device = rssm_observe.device_with(lower.start.deter)
    zl, zu = (rssm_observe.shape_of(model.start, model.weights, model.latent, device) for model in (lower, upper))
    return device, zl, zu


class Wavefront:
    """:class:`apv_fast.recurrence.stacked.StackedBackend` in Triton."""

    scan: ScanBackend = TritonScan()

    def forward(
        self, lower: Model, upper: Model, link: Link, inputs: tuple[ScanInputs, ScanInputs]
    ) -> tuple[Trace, Trace]:
        """See :class:`apv_fast.recurrence.stacked.StackedBackend`."""
        device, zl, zu = _shapes(lower, upper)
        batch, length = lower.start.keep.shape
        below, above = (empty_trace(model.weights, model.start, model.latent) for model in (lower, upper))
        if batch and length:
            fl = rssm_observe.forward_arguments(lower.weights, inputs[0], lower.start, below, lower.latent, zl)
            fu = rssm_observe.forward_arguments(upper.weights, inputs[1], upper.start, above, upper.latent, zu)
            stoch = packed(link.stoch.T if lower.latent.discrete else link.stoch)
            seen = LinkForward(stoch, packed(link.deter), fl.hidden, fl.sample)
            arguments = (batch, length, fl, fu, seen, zl, zu)
            rounds = list(range(length + 1))
            like = lower.start.deter
            kernels = forward_kernel, forward_phase_kernel
            registers, _ = stacked_registers(device)
            rssm_observe.launch(*kernels, rounds, like, arguments, device.programs, registers)
        return below, above

    def backward(
        self, lower: Model, upper: Model, link: Link, traces: tuple[Trace, Trace], grads: tuple[TraceGrads, TraceGrads]
    ) -> tuple[ScanGrads, ScanGrads]:
        """See :class:`apv_fast.recurrence.stacked.StackedBackend`."""
        device, zl, zu = _shapes(lower, upper)
        batch, length = lower.start.keep.shape
        gl = rssm_observe.backward_arguments(lower.weights, lower.start, traces[0], grads[0], zl)
        gu = rssm_observe.backward_arguments(upper.weights, upper.start, traces[1], grads[1], zu)
        if batch and length:
            grad_link = LinkBackward(packed(link.stoch.T), packed(link.deter.T), gu.dy)
            arguments = (batch, length, gl, gu, grad_link, zl, zu)
            rounds = list(range(length + 1))
            like = lower.start.deter
            kernels = backward_kernel, backward_phase_kernel
            _, registers = stacked_registers(device)
            rssm_observe.launch(*kernels, rounds, like, arguments, device.programs, registers)
        return scan_grads(gl), scan_grads(gu)


stacked_observe = stacked_on("triton", Wavefront())

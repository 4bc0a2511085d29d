"""The RSSM's posterior scan in Triton: ``rssm_observe`` with the recurrence in one persistent launch, or one a phase.

The persistent kernel runs all T steps in one cooperative launch of a program a multiprocessor, with a grid barrier
after every phase (:mod:`apv_fast.kernels.parts.grid`). Where that is impossible the same phases are launched one by
one, 5·T of them, which a CUDA graph can hold; so does Triton's interpreter. ``APV_FAST_SCAN`` chooses: persistent or
phases.

Nothing here stops the device, and all memory comes from torch, so a CUDA graph can record either.
"""
# Kernels are Triton, not Python.
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from apv_fast.recurrence.observe import observe_on
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

from .parts.grid import device_of, grid_barrier, scan_driver
from .parts.latent import sample_latent, sample_latent_backward
from .parts.rssm_backward import backward_phase
from .parts.rssm_forward import forward_phase
from .parts.scan_arguments import WARPS, Backward, Device, Forward, Shape, make_shape
from .parts.tiles import on, precision

PHASES = tl.constexpr(5)  # of either direction


@triton.jit(do_not_specialize=["B", "T"])
def forward_kernel(counter, B, T, f, z: tl.constexpr):
    """All steps in one cooperative launch; ``counter`` is an int32 zero."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    for t in range(T):
        for phase in tl.static_range(1, PHASES + 1):
            forward_phase(phase, pid, programs, t, B, T, f, z, None, None)
            grid_barrier(counter, programs * (PHASES * t + phase))


@triton.jit(do_not_specialize=["t", "B", "T"])
def forward_phase_kernel(t, B, T, f, z: tl.constexpr, PHASE: tl.constexpr):
    """One phase of one step."""
    forward_phase(PHASE, tl.program_id(0), tl.num_programs(0), t, B, T, f, z, None, None)


@triton.jit(do_not_specialize=["B", "T"])
def backward_kernel(counter, B, T, g, z: tl.constexpr):
    """All steps, from the last to the first, in one cooperative launch; ``counter`` is an int32 zero."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    for done in range(T):
        for phase in tl.static_range(1, PHASES + 1):
            backward_phase(phase, pid, programs, T - 1 - done, B, T, g, z, None, None)
            grid_barrier(counter, programs * (PHASES * done + phase))


@triton.jit(do_not_specialize=["t", "B", "T"])
def backward_phase_kernel(t, B, T, g, z: tl.constexpr, PHASE: tl.constexpr):
    """One phase of one step."""
    backward_phase(PHASE, tl.program_id(0), tl.num_programs(0), t, B, T, g, z, None, None)


def packed(weight: Tensor) -> Tensor:
    """Contiguous and 16-byte aligned, as wide loads need it; a copy only where it is not."""
    weight = weight.contiguous()
    return weight if weight.data_ptr() % 16 == 0 else weight.clone()


def _noise(noise: Tensor | None) -> tuple[str, Tensor | None]:
    """Kind of noise, and its tensor."""
    if noise is None:
        return "none", None
    return ("given", noise.contiguous()) if noise.is_floating_point() else ("seed", noise)


def device_with(tensor: Tensor) -> Device:
    """The device that holds ``tensor``."""
    if not tensor.is_cuda:
        return device_of(None)
    return device_of(tensor.get_device())


def shape_of(start: ScanStart, weights: ScanWeights, latent: Latent, device: Device) -> Shape:
    """Sizes and tiles of a scan."""
    batch, deter = start.deter.shape
    kind, _ = _noise(start.noise)
    hidden, itemsize = len(weights.obs), weights.gru.element_size()
    return make_shape(deter, hidden, latent, batch, itemsize, kind, precision(), device)


def forward_arguments(
    weights: ScanWeights, inputs: ScanInputs, start: ScanStart, trace: Trace, latent: Latent, z: Shape
) -> Forward:
    """Packed weights, trace and scratch of one model."""
    batch, deter = start.deter.shape
    dtype, (_, noise) = weights.gru.dtype, _noise(start.noise)
    before = torch.where(start.keep[:, :1], start.deter, 0).to(dtype)
    joined = torch.cat([before.new_empty(batch, z.H), before], 1)
    sample = joined.new_empty(batch, z.S) if z.C == 0 else joined.new_empty(batch, z.S, dtype=torch.int32)
    return Forward(
        stoch_weight=packed(weights.stoch.T if latent.discrete else weights.stoch),
        gru_weight=packed(weights.gru),
        gru_bias=weights.gru_bias.contiguous(),
        norm_weight=weights.norm_weight.contiguous(),
        norm_bias=weights.norm_bias.contiguous(),
        obs_weight=packed(weights.obs),
        dist_weight=packed(weights.dist),
        dist_bias=weights.dist_bias.contiguous(),
        in_x=inputs.x.contiguous(),
        in_obs=inputs.obs.contiguous(),
        keep=start.keep.contiguous().view(torch.uint8),
        start=start.deter.contiguous(),
        noise=noise,
        **trace._asdict(),
        joined=joined,
        hidden=joined.new_empty(2, batch, deter),
        sample=sample,
        sums=start.deter.new_empty(2, z.unit_tiles, batch),
    )


def backward_arguments(weights: ScanWeights, start: ScanStart, trace: Trace, grads: TraceGrads, z: Shape) -> Backward:
    """Packed weights, gradients and scratch of one model."""
    (batch, length), wide, narrow = start.keep.shape, start.deter.new_empty, weights.gru.new_empty
    _, noise = _noise(start.noise)
    return Backward(
        stoch_weight=packed(weights.stoch.T),
        gru_weight=packed(weights.gru.T),
        obs_weight=packed(weights.obs.T),
        dist_weight=packed(weights.dist.T),
        norm_weight=weights.norm_weight.contiguous(),
        norm_bias=weights.norm_bias.contiguous(),
        keep=start.keep.contiguous().view(torch.uint8),
        start=start.deter.contiguous(),
        noise=noise,
        **{name: getattr(trace, name) for name in ("deter", "stats", "x", "parts", "norm", "y")},
        **{f"of_{name}": None if grad is None else grad.contiguous() for name, grad in grads._asdict().items()},
        dx=narrow(batch, length, z.H),
        dparts=narrow(batch, length, 3 * z.D),
        dy=narrow(batch, length, z.H),
        dstats=narrow(batch, length, z.M),
        carry=start.deter.new_zeros(batch, z.D),
        dnorm=start.deter.new_zeros(-(-batch // z.BM), 2, 3 * z.D),
        dscaled=wide(batch, 3 * z.D),
        direct=wide(batch, z.D),
        sums=wide(2, z.unit_tiles, batch),
    )


def scan_grads(back: Backward) -> ScanGrads:
    """What the backward kernels have left."""
    weight, bias = (back.dnorm[:, i].sum(0) for i in range(2))  # two tensors: an op's outputs may not share memory
    return ScanGrads(back.dx, back.dparts, back.dy, back.dstats, back.carry, weight, bias)


def launch(
    whole: Any,
    phase: Any,
    rounds: list[int],
    like: Tensor,
    arguments: tuple[Any, ...],
    programs: int,
    registers: int | None = None,
) -> None:
    """Run a recurrence: ``whole`` in one cooperative launch, or ``phase`` once a phase of each of ``rounds``.

    ``registers`` is the most that a thread of ``whole`` may have.
    """
    with on(like):
        if scan_driver(like.device)[0] == "persistent":
            counter = torch.zeros(1, dtype=torch.int32, device=like.device)
            options = {"num_warps": WARPS, "launch_cooperative_grid": True, "maxnreg": registers}
            whole[(programs,)](counter, *arguments, **options)
            return
        for t in rounds:
            for number in range(1, PHASES.value + 1):
                phase[(programs,)](t, *arguments, PHASE=number, num_warps=WARPS)


class TritonScan(TorchProducts):
    """:class:`apv_fast.recurrence.phases.ScanBackend` in Triton."""

    sample = staticmethod(sample_latent)
    sample_backward = staticmethod(sample_latent_backward)

    def forward(self, weights: ScanWeights, inputs: ScanInputs, start: ScanStart, latent: Latent) -> Trace:
        """See :class:`apv_fast.recurrence.phases.ScanBackend`."""
        device, (batch, length) = device_with(start.deter), start.keep.shape
        z = shape_of(start, weights, latent, device)
        trace = empty_trace(weights, start, latent)
        if batch and length:
            f = forward_arguments(weights, inputs, start, trace, latent, z)
            arguments = (batch, length, f, z)
            launch(forward_kernel, forward_phase_kernel, list(range(length)), start.deter, arguments, device.programs)
        return trace

    def backward(
        self, weights: ScanWeights, start: ScanStart, trace: Trace, grads: TraceGrads, latent: Latent
    ) -> ScanGrads:
        """See :class:`apv_fast.recurrence.phases.ScanBackend`."""
        device, (batch, length) = device_with(start.deter), start.keep.shape
        z = shape_of(start, weights, latent, device)
        g = backward_arguments(weights, start, trace, grads, z)
        if batch and length:
            rounds = list(reversed(range(length)))
            arguments = (batch, length, g, z)
            launch(backward_kernel, backward_phase_kernel, rounds, start.deter, arguments, device.programs)
        return scan_grads(g)


rssm_observe = observe_on("triton", TritonScan())

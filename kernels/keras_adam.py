r"""One step of Keras' Adam: a pass over all gradients for their norm, a pass over everything for the step.

With the gradients g of all weights w, the moments m and v, step number t and rate η::

    norm = √Σ g²      g ← g·min(1, clip/norm)      w ← (1 - decay)·w
    m ← m + (1 - β₁)(g - m)      v ← β₂·v + (1 - β₂)·g²
    w ← w - η·√(1 - β₂ᵗ)/(1 - β₁ᵗ) · m/(√v + ε)

A weight without a gradient decays and keeps its moments. Three launches: addresses, norm, step. Weights may have copies
in a narrower dtype, which the step writes in the same pass.

Moments lie in flat buffers. Weights and gradients stay where they are and are reached through a table of addresses. The
usual flat gradient buffer, whose views are the weights' ``.grad``, makes autograd add into it: for 40 M weights that is
640 MB more (clear 160, read 320, write 160; 0.19 ms of an H100's 3.35 TB/s, on a floor of 0.38) and a launch a weight,
where a gradient that is None before is simply handed over. Addresses are written to the table by a kernel that takes
them as arguments, so a CUDA graph records them and nothing is copied from the host.

Clock and rate are device scalars, the rate's correction is computed in float64 by every program. The norm's first stage
has at most :data:`PROGRAMS` programs, each with one partial sum; every program of the step adds those in the same
order. No atomics: the same gradients give the same bits. Weights are float32 or float64, all of one kind.

Floor, 40 M float32 weights: the norm reads 160 MB, the step reads w, g, m, v and writes w, m, v, 1120 MB; 1.28 GB, 0.38
ms of an H100's 3.35 TB/s.
"""
# Kernels are Triton, not Python: arguments are pointers.
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from apv_fast.reference.keras_adam import Settings, laid_out

from .parts.tiles import on, only_if, rounded

CHUNK = 4096  # numbers of one weight that a program takes at a time
WARPS = 16  # 8 numbers a thread
PROGRAMS = 1024  # of the norm's first stage, at most; a power of 2
ADDRESSES = 64  # that a launch writes to a table


@triton.jit
def addresses_kernel(table, tensors, COUNT: tl.constexpr):
    """Write the addresses of COUNT tensors to the table."""
    for i in tl.static_range(COUNT):
        tl.store(table + i, tensors[i].to(tl.int64))


@triton.jit
def _pointer(address, DTYPE: tl.constexpr):
    return address.to(tl.pointer_type(DTYPE))


@triton.jit
def _chunk(plan, chunk):
    """(weight, offset in it, how many numbers, offset in the flat moments) of a chunk, from its row of four."""
    row = plan + chunk.to(tl.int64) * 4
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)


@triton.jit(do_not_specialize=["chunks"])
def norm_kernel(
    plan, gradients, nothing, partial, iteration,  # [chunks, 4], [weights], any, [programs], []
    chunks, DTYPE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Σ g² of every programs-th chunk; the first program counts the step."""
    if tl.program_id(0) == 0:
        tl.store(iteration, tl.load(iteration) + 1)
    lane = tl.arange(0, CHUNK)
    total = tl.zeros([CHUNK], DTYPE)
    chunk = tl.program_id(0)
    while chunk < chunks:
        weight, start, count, _ = _chunk(plan, chunk)
        address = tl.load(gradients + weight)
        gradient = _pointer(address, DTYPE) + start
        has_gradient = address != nothing.to(tl.int64)
        if (address % 16 == 0) & (count == CHUNK):  # 16 bytes an access
            number = tl.load(tl.multiple_of(gradient, 16) + lane, only_if(has_gradient, lane < CHUNK), 0.0)
        else:
            number = tl.load(gradient + lane, only_if(has_gradient, lane < count), 0.0)
        total += number * number
        chunk += tl.num_programs(0)
    tl.store(partial + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _update(
    w, g, m, v, inside, scale, rate, has_gradient,
    EPS: tl.constexpr, DECAY: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr,
):  # fmt: skip
    """Decay, and where there is a gradient the step, of the numbers that the four pointers and the mask show.

    Returns them.
    """
    weight = tl.load(w, inside) * (1 - DECAY)
    moved = only_if(has_gradient, inside)
    gradient = tl.load(g, moved, 0.0) * scale
    first = tl.load(m, moved, 0.0)
    first += (1 - BETA1) * (gradient - first)
    second = tl.load(v, moved, 0.0) * BETA2 + (1 - BETA2) * gradient * gradient
    weight = tl.where(moved, weight - rate * (first / (tl.sqrt(second) + EPS)), weight)
    tl.store(w, weight, inside)
    tl.store(m, first, moved)
    tl.store(v, second, moved)
    return weight


@triton.jit
def _copy(copies, nothing, weight, start, lane, count, number, COPY: tl.constexpr):
    """A chunk's numbers to its weight's copy, if that has one; its memory is torch's own, so it is aligned."""
    address = tl.load(copies + weight)
    copy = tl.multiple_of(_pointer(address, COPY) + start, 16)
    tl.store(copy + lane, rounded(number, COPY), lane < tl.where(address != nothing.to(tl.int64), count, 0))


@triton.jit(do_not_specialize=["programs"])
def step_kernel(
    plan, weights, gradients, nothing, partial, m, v,  # [chunks, 4], [weights] twice, any, [programs], flat twice
    lr, iteration, norm_out,  # [] float64, [] int64, []
    copies,  # [weights], or None
    programs, EPS: tl.constexpr, CLIP: tl.constexpr, DECAY: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr,
    LOG1: tl.constexpr, LOG2: tl.constexpr, DTYPE: tl.constexpr, CHUNK: tl.constexpr, PARTIALS: tl.constexpr,
    COPY: tl.constexpr,
):  # fmt: skip
    """The step of one chunk; LOG1 and LOG2 are the logarithms of the betas, COPY the dtype of all copies."""
    each = tl.arange(0, PARTIALS)
    norm = tl.sqrt(tl.sum(tl.load(partial + each, each < programs, 0.0).to(tl.float64), 0)).to(DTYPE)
    if tl.program_id(0) == 0:
        tl.store(norm_out, norm)
    scale = CLIP / norm
    scale = tl.where(scale >= 1, 1.0, scale)  # a NaN stays one
    t = tl.load(iteration).to(tl.float64)
    rate = (tl.load(lr) * tl.sqrt(1.0 - tl.exp(t * LOG2)) / (1.0 - tl.exp(t * LOG1))).to(DTYPE)

    weight, start, count, place = _chunk(plan, tl.program_id(0))
    w, g = tl.load(weights + weight), tl.load(gradients + weight)
    has_gradient = g != nothing.to(tl.int64)
    aligned = (w % 16 == 0) & (g % 16 == 0) & (count == CHUNK)
    lane = tl.arange(0, CHUNK)
    w, g = _pointer(w, DTYPE) + start, _pointer(g, DTYPE) + start
    m, v = tl.multiple_of(m + place, 16), tl.multiple_of(v + place, 16)
    if aligned:  # 16 bytes an access
        w, g = tl.multiple_of(w, 16), tl.multiple_of(g, 16)
        number = _update(
            w + lane, g + lane, m + lane, v + lane, lane < CHUNK, scale, rate, has_gradient, EPS, DECAY, BETA1, BETA2
        )
        if copies is not None:
            _copy(copies, nothing, weight, start, lane, count, number, COPY)
    else:
        number = _update(
            w + lane, g + lane, m + lane, v + lane, lane < count, scale, rate, has_gradient, EPS, DECAY, BETA1, BETA2
        )
        if copies is not None:
            _copy(copies, nothing, weight, start, lane, count, number, COPY)


def _logarithm(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


class Step:
    """Takes steps with some weights and their moments, in place, never waiting for the device.

    Args:
        weights: float32 or float64, all of one dtype on one device, their memory without gaps or overlaps.
        first: their first moments, pieces of one flat buffer at multiples of 64 numbers.
        second: their second moments, pieces of another at the same places.
        copies: of each weight in a narrower dtype, all in one, with the weight's strides; None for those without.

    Raises:
        TypeError: the weights' dtypes differ or are something else.
        ValueError: the weights' devices differ, or the memory of one has gaps or overlaps.
    """

    writes_copies = True

    def __init__(
        self,
        weights: Sequence[Tensor],
        first: Sequence[Tensor],
        second: Sequence[Tensor],
        copies: Sequence[Tensor | None] = (),
    ) -> None:
        self.weights, self.copies = list(weights), list(copies)
        for i, w in enumerate(self.weights):
            if w.dtype not in (torch.float32, torch.float64) or w.dtype != self.weights[0].dtype:
                raise TypeError(
                    f"KerasAdam: weight {i} has dtype {w.dtype}; all must be float32, or all float64; "
                    "backend='reference' takes others"
                )
            if w.device != self.weights[0].device:
                raise ValueError(f"KerasAdam: weight {i} is on {w.device}; it must be on {self.weights[0].device}")
            if torch.empty_like(w).stride() != w.stride():
                raise ValueError(f"KerasAdam: weight {i} has strides {w.stride()}; it must be without gaps or overlaps")
        self._nothing = self.weights[0].new_full((1,), math.nan)  # its address stands for a gradient that is None
        self._first, self._second = (m[0].new_empty(0).set_(m[0].untyped_storage()) for m in (first, second))
        places = [m.storage_offset() for m in first]
        rows = [
            (i, start, min(CHUNK, w.numel() - start), place + start)
            for i, (w, place) in enumerate(zip(self.weights, places, strict=True))
            for start in range(0, w.numel(), CHUNK)
        ]
        device = self._nothing.device
        self._plan = torch.tensor(rows, dtype=torch.int64).reshape(-1, 4).to(device)
        size = triton.cdiv(len(self.weights), ADDRESSES) * ADDRESSES
        self._places, self._gradients, self._copies = torch.zeros(3, size, dtype=torch.int64, device=device)
        self._partial = self._nothing.new_empty(min(PROGRAMS, len(rows)))

    def __call__(
        self, gradients: Sequence[Tensor | None], rate: Tensor, iteration: Tensor, settings: Settings
    ) -> Tensor:
        """One step, as :class:`apv_fast.reference.keras_adam.Step` describes it."""
        if not len(self._plan):
            iteration.add_(1)
            return self._nothing.new_zeros(())
        norm = self._nothing.new_empty(())
        tensors = [self._nothing if g is None else laid_out(g, w) for g, w in zip(gradients, self.weights, strict=True)]
        kind = tl.float64 if norm.dtype == torch.float64 else tl.float32
        common = dict(DTYPE=kind, CHUNK=CHUNK, num_warps=WARPS)
        (beta1, beta2), programs = settings.betas, len(self._partial)
        narrow = [copy for copy in self.copies if copy is not None]
        copy_kind = tl.float16 if narrow and narrow[0].dtype == torch.float16 else tl.bfloat16
        with on(norm):
            self._write(self._places, self.weights)
            self._write(self._gradients, tensors)
            if narrow:
                self._write(self._copies, [self._nothing if copy is None else copy for copy in self.copies])
            norm_kernel[(programs,)](
                self._plan, self._gradients, self._nothing, self._partial, iteration, len(self._plan), **common
            )
            step_kernel[(len(self._plan),)](
                self._plan, self._places, self._gradients, self._nothing, self._partial, self._first, self._second,
                rate, iteration, norm, self._copies if narrow else None, programs,
                EPS=settings.eps, CLIP=settings.clip, DECAY=settings.weight_decay, BETA1=beta1, BETA2=beta2,
                LOG1=_logarithm(beta1), LOG2=_logarithm(beta2), PARTIALS=triton.next_power_of_2(programs),
                COPY=copy_kind, **common,
            )  # fmt: skip
        torch.autograd.graph.increment_version([*self.weights, *narrow])  # autograd has not seen the kernel write them
        return norm

    def _write(self, table: Tensor, tensors: list[Tensor]) -> None:
        """Addresses into a table, in the order of the stream and with no copy from the host."""
        for start in range(0, len(tensors), ADDRESSES):
            part = tensors[start : start + ADDRESSES]
            part += [self._nothing] * (ADDRESSES - len(part))
            addresses_kernel[(1,)](table[start:], tuple(part), COUNT=ADDRESSES, num_warps=1)

"""What the RSSM scan's kernels take: tensors by name, and the sizes and tiles that they are compiled for.

No Triton here, so that the table of ahead-of-time compilations can name these without importing it. A kernel's argument
may be such a named tuple; a field that is None is a compile-time None. L = S·C or S, M = S·C or 2·S as in
:mod:`apv_fast.recurrence.phases`; "wide" is the states' dtype, "narrow" the weights'.
"""

from __future__ import annotations

import functools
import importlib.metadata
from typing import Any, NamedTuple

from apv_fast.types import Latent


class Forward(NamedTuple):
    """Tensors of the forward recurrence; contiguous."""

    stoch_weight: Any  # narrow: [L, H] for categorical latents (rows are gathered), [H, L] for Gaussian ones
    gru_weight: Any  # [3D, H + D] narrow
    gru_bias: Any  # [3D] narrow
    norm_weight: Any  # [3D] narrow
    norm_bias: Any  # [3D] narrow
    obs_weight: Any  # [H, D] narrow
    dist_weight: Any  # [M, H] narrow
    dist_bias: Any  # [M] narrow
    in_x: Any  # [B, T, H] narrow
    in_obs: Any  # [B, T, H] narrow
    keep: Any  # [B, T] uint8
    start: Any  # [B, D] wide
    noise: Any  # [B, T, L] wide, an int64 scalar, or None
    deter: Any  # [B, T, D] wide: from here on, the trace
    stoch: Any  # [B, T, L] wide
    stats: Any  # [B, T, M] wide
    x: Any  # [B, T, H] narrow
    parts: Any  # [B, T, 3D] wide
    norm: Any  # [B, T, 2] wide
    y: Any  # [B, T, H] narrow
    joined: Any  # [B, H + D] narrow, scratch: x_t beside keep_t·h_{t-1}, what the GRU's product reads
    hidden: Any  # [2, B, D] narrow, scratch: h_t, by the parity of t
    sample: Any  # scratch: [B, S] int32, rows of stoch_weight; Gaussian: [B, S] narrow
    sums: Any  # [2, tiles, B] wide, scratch: mean and sum of squared deviations of each tile's parts


class Backward(NamedTuple):
    """Tensors of the backward recurrence; contiguous."""

    stoch_weight: Any  # [L, H] narrow
    gru_weight: Any  # [H + D, 3D] narrow
    obs_weight: Any  # [D, H] narrow
    dist_weight: Any  # [H, M] narrow
    norm_weight: Any  # [3D] narrow
    norm_bias: Any  # [3D] narrow
    keep: Any  # [B, T] uint8
    start: Any  # [B, D] wide
    noise: Any  # as in Forward
    deter: Any  # [B, T, D] wide: from here on, the trace
    stats: Any  # [B, T, M] wide
    x: Any  # [B, T, H] narrow
    parts: Any  # [B, T, 3D] wide
    norm: Any  # [B, T, 2] wide
    y: Any  # [B, T, H] narrow
    of_deter: Any  # [B, T, D] wide or None: gradients that come from outside
    of_stoch: Any  # [B, T, L] wide or None
    of_stats: Any  # [B, T, M] wide or None
    dx: Any  # [B, T, H] narrow: from here on, what is made
    dparts: Any  # [B, T, 3D] narrow
    dy: Any  # [B, T, H] narrow
    dstats: Any  # [B, T, M] narrow
    carry: Any  # [B, D] wide, zeros at first; in the end the gradient of start
    dnorm: Any  # [row tiles, 2, 3D] wide, zeros at first: gradients of norm_weight and norm_bias
    dscaled: Any  # [B, 3D] wide, scratch: gradient of the normalised parts
    direct: Any  # [B, D] wide, scratch: (1 - g)·dh, what skips the GRU
    sums: Any  # [2, tiles, B] wide, scratch: each tile's part of LayerNorm's two sums


class LinkForward(NamedTuple):
    """What an upper model sees of a lower one; weights narrow and contiguous, the rest is the lower model's scratch."""

    stoch_weight: Any  # [L, H] categorical, [H, L] Gaussian; L of the lower model, H of the upper one
    deter_weight: Any  # [H, D]
    hidden: Any  # [2, B, D]
    sample: Any  # [B, S]


class LinkBackward(NamedTuple):
    """What a lower model receives from an upper one."""

    stoch_weight: Any  # [L, H] narrow
    deter_weight: Any  # [D, H] narrow
    dy: Any  # [B, T, H] narrow, made by the upper model


class Shape(NamedTuple):
    """Sizes and tiles: compile-time constants. Everything in capitals below BM is a power of two."""

    D: int
    H: int
    S: int
    C: int  # 0: Gaussian
    L: int
    M: int
    MIN_STD: float
    NOISE: str  # "none", "given" or "seed"
    PRECISION: str  # of products: "ieee" or "tf32", which float32 alone heeds, or "fma": without tensor cores
    BM: int  # rows a tile of products
    ROWS: int  # rows a tile of pointwise phases, which are wider instead: fewer rows' statistics to merge a program
    UNITS: int  # GRU units a tile, each with its columns of r, c and g
    COLUMNS: int  # columns of x or y a tile
    GROUPS: int  # categorical variables (Gaussian: samples) a tile
    CLASSES: int  # C padded; 2 for Gaussian latents: mean and std
    BACK: int  # columns a tile of [dx, carry]
    GATHER_ROWS: int  # rows and columns a tile where rows of weights are gathered
    GATHER_COLUMNS: int
    SPLIT: int  # products split their sum in SPLIT slices, one or more a warp
    DEPTH: int  # terms of a slice loaded at once
    STAGES: int  # Triton's pipelining depth; it holds one buffer less
    MANY_ROWS: int  # from here on, warps share a product's rows instead of its sum

    @property
    def unit_tiles(self) -> int:
        """Column tiles of the phases that walk over GRU units."""
        return -(-self.D // self.UNITS)


class Device(NamedTuple):
    """What tiles depend on."""

    programs: int  # multiprocessors
    shared: int  # bytes of shared memory a program may have
    interpret: bool
    major: int = 9  # of a GPU's compute capability


WARPS = 8
MANY_ROWS = 64
RESERVED = 24 * 1024  # bytes of shared memory left to reductions and changes of layout


def power(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def _spread(columns: int, device: Device) -> int:
    """Columns a tile: one tile a multiprocessor, at least 8 as tensor cores want, at most 32."""
    return min(max(8, power(-(-columns // device.programs))), 128 if device.interpret else 32)


def _most_rows(major: int) -> int:
    """Rows of a tile of products: from 64 on, compute capability 10 and 11 multiply in tensor memory, which Triton
    (3.7.1) cannot compile in functions that are called, as phases are."""
    return MANY_ROWS // 2 if major in (10, 11) else MANY_ROWS


def stacked_registers(device: Device) -> tuple[int | None, int | None]:
    """The most registers that a thread of the wavefront may have, forward and backward.

    ptxas, left alone (None), chooses 128 in some of these and spills; what does not spill for one generation may for
    another. For sm_90 Triton 3.9 has a newer ptxas: alone it does well, with 168 it spills.
    """
    if device.major == 9 and _triton() >= (3, 9):
        return None, None
    return {10: (224, None), 11: (224, None), 12: (168, 224)}.get(device.major, (168, None))


@functools.cache
def _triton() -> tuple[int, ...]:
    """Triton's version without importing it; of none, nothing."""
    try:
        return tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return ()


def make_shape(
    deter: int, hidden: int, latent: Latent, batch: int, itemsize: int, noise: str, precision: str, device: Device
) -> Shape:
    """The tiles for a model's sizes on a device."""
    classes = max(2, power(latent.discrete or 2))
    groups = max(1, (256 if device.interpret else 32) // classes)
    units = _spread(deter, device)
    by_hand = itemsize == 8 and not device.interpret  # float64 on a GPU is for gradient checks
    rows = min(max(16, power(batch)), 4096 if device.interpret else 16 if by_hand else _most_rows(device.major))
    depth = 64 // itemsize
    split = 1 if device.interpret else WARPS
    widest = max(4 * units, groups * classes)
    if rows == MANY_ROWS // 2 and split * rows * widest * 4 > device.shared:
        rows //= 2  # the slices' sums meet in shared memory
    stage = (4 if rows >= MANY_ROWS else split) * (rows + widest) * depth * itemsize
    buffers = min(max((device.shared - RESERVED) // stage, 1), 3)
    if device.interpret:
        depth = max(16, power(max(3 * deter, deter + hidden, latent.stoch * classes)))
    return Shape(
        D=deter,
        H=hidden,
        S=latent.stoch,
        C=latent.discrete,
        L=latent.stoch * (latent.discrete or 1),
        M=latent.stoch * (latent.discrete or 2),
        MIN_STD=latent.min_std,
        NOISE=noise,
        PRECISION="fma" if by_hand else precision,
        BM=rows,
        ROWS=rows if device.interpret else rows // 4,
        UNITS=units,
        COLUMNS=_spread(hidden, device),
        GROUPS=groups,
        CLASSES=classes,
        BACK=_spread(hidden + deter, device),
        GATHER_ROWS=rows if device.interpret else 1,
        GATHER_COLUMNS=min(power(hidden), 128),
        SPLIT=split,
        DEPTH=depth,
        STAGES=1 + buffers,
        MANY_ROWS=MANY_ROWS,
    )

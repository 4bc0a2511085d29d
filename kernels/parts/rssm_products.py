"""Device functions that the phases of the RSSM scan are made of: products of a few rows, gathered sums, layouts.

A product of 16 or 32 rows is nothing to share among eight warps but its deep sum: operands are loaded as ``[SPLIT,
rows, DEPTH]``, multiplied as a batch of SPLIT small products with an accumulator each, and added up once at the end. A
warp's chain of dependent tensor-core instructions is then SPLIT times shorter. (Triton gives the batch to the warps, so
each warp then holds the whole result; with 64 rows that would be 64 registers a thread, and warps share the rows.)
"""
# Kernels are Triton, not Python.
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import INTERPRETED


@triton.jit
def rows_of(tile, B, BM: tl.constexpr):
    """Row numbers ``[BM]`` of a row tile, as 64 bits so that no offset overflows, and which of them exist."""
    rows = tl.arange(0, BM).to(tl.int64) + tile * BM
    return rows, rows < B


@triton.jit
def product(a_rows, a_mask, w_rows, w_mask, K: tl.constexpr, z: tl.constexpr):
    """Σ_k a[i, k]·w[n, k], ``[BM, N]``, of pointers to the rows of both; masked rows count as zeros.

    ``a`` may have been written by other programs of this launch: it is read past the L1 cache.
    """
    if z.PRECISION == "fma":
        return _product_by_hand(a_rows, a_mask, w_rows, w_mask, K, z)
    elif a_rows.shape[0] >= z.MANY_ROWS:
        return _product_of_many(a_rows, a_mask, w_rows, w_mask, K, z)
    else:
        return _product_of_few(a_rows, a_mask, w_rows, w_mask, K, z)


@triton.jit
def _product_of_few(a_rows, a_mask, w_rows, w_mask, K: tl.constexpr, z: tl.constexpr):
    """Of up to 32 rows: in SPLIT slices of the sum, a warp each."""
    BM: tl.constexpr = a_rows.shape[0]
    N: tl.constexpr = w_rows.shape[0]
    ACC: tl.constexpr = tl.float64 if a_rows.dtype.element_ty == tl.float64 else tl.float32
    SPLIT: tl.constexpr = z.SPLIT
    STEP: tl.constexpr = SPLIT * z.DEPTH
    k = (tl.arange(0, SPLIT) * z.DEPTH)[:, None, None] + tl.arange(0, z.DEPTH)[None, None, :]
    acc = tl.zeros([SPLIT, BM, N], ACC)
    for start in tl.range(0, K, STEP, num_stages=z.STAGES):
        term = start + k
        if K % STEP == 0:
            a = tl.load(a_rows[None, :, None] + term, a_mask[None, :, None], 0.0, cache_modifier=".cg")
            w = tl.load(w_rows[None, :, None] + term, w_mask[None, :, None], 0.0)
        else:
            a = tl.load(a_rows[None, :, None] + term, a_mask[None, :, None] & (term < K), 0.0, cache_modifier=".cg")
            w = tl.load(w_rows[None, :, None] + term, w_mask[None, :, None] & (term < K), 0.0)
        if INTERPRETED:  # its products of bfloat16 are wrong
            a = a.to(ACC)
            w = w.to(ACC)
        acc = tl.dot(a, tl.permute(w, (0, 2, 1)), acc, input_precision=z.PRECISION, out_dtype=ACC)
    return tl.sum(acc, 0)


@triton.jit
def _product_of_many(a_rows, a_mask, w_rows, w_mask, K: tl.constexpr, z: tl.constexpr):
    """Of 64 rows and more, which are enough for all warps to have rows of their own (and for wgmma on Hopper)."""
    BM: tl.constexpr = a_rows.shape[0]
    N: tl.constexpr = w_rows.shape[0]
    ACC: tl.constexpr = tl.float64 if a_rows.dtype.element_ty == tl.float64 else tl.float32
    STEP: tl.constexpr = 4 * z.DEPTH
    k = tl.arange(0, STEP)[None, :]
    acc = tl.zeros([BM, N], ACC)
    for start in tl.range(0, K, STEP, num_stages=z.STAGES):
        term = start + k
        if K % STEP == 0:
            a = tl.load(a_rows[:, None] + term, a_mask[:, None], 0.0, cache_modifier=".cg")
            w = tl.load(w_rows[:, None] + term, w_mask[:, None], 0.0)
        else:
            a = tl.load(a_rows[:, None] + term, a_mask[:, None] & (term < K), 0.0, cache_modifier=".cg")
            w = tl.load(w_rows[:, None] + term, w_mask[:, None] & (term < K), 0.0)
        if INTERPRETED:  # its products of bfloat16 are wrong
            a = a.to(ACC)
            w = w.to(ACC)
        acc = tl.dot(a, tl.trans(w), acc, input_precision=z.PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def _product_by_hand(a_rows, a_mask, w_rows, w_mask, K: tl.constexpr, z: tl.constexpr):
    """Without tensor cores: of float64, some of whose products Triton cannot compile (3.6 and 3.7, in MMAv2.cpp)."""
    BM: tl.constexpr = a_rows.shape[0]
    N: tl.constexpr = w_rows.shape[0]
    k = tl.arange(0, z.DEPTH)[None, :]
    acc = tl.zeros([BM, N], a_rows.dtype.element_ty)
    for start in range(0, K, z.DEPTH):
        term = start + k
        a = tl.load(a_rows[:, None] + term, a_mask[:, None] & (term < K), 0.0, cache_modifier=".cg")
        w = tl.load(w_rows[:, None] + term, w_mask[:, None] & (term < K), 0.0)
        acc += tl.sum(a[:, None, :] * w[None, :, :], 2)
    return acc


@triton.jit
def gathered(index, weights, rows, row_mask, columns, column_mask, S: tl.constexpr, WIDTH: tl.constexpr):
    """Σ_s weights[index[i, s], n], ``[R, N]``: one-hot latents times ``weights [L, WIDTH]``; ``index [B, S]``."""
    R: tl.constexpr = rows.shape[0]
    N: tl.constexpr = columns.shape[0]
    ACC: tl.constexpr = tl.float64 if weights.dtype.element_ty == tl.float64 else tl.float32
    FIT: tl.constexpr = 8192 // (R * N)
    WHOLE: tl.constexpr = triton.next_power_of_2(S)
    BS: tl.constexpr = WHOLE if FIT >= WHOLE else (FIT if FIT >= 1 else 1)
    total = tl.zeros([R, N], ACC)
    for start in tl.static_range(0, S, BS):
        s = start + tl.arange(0, BS)
        mask = row_mask[:, None] & (s < S)[None, :]
        at = tl.load(index + rows[:, None] * S + s[None, :], mask, 0, cache_modifier=".cg")
        picked = weights + at.to(tl.int64)[:, :, None] * WIDTH + columns[None, None, :]
        total += tl.sum(tl.load(picked, mask[:, :, None] & column_mask[None, None, :], 0.0).to(ACC), 1)
    return total


@triton.jit
def latent_columns(tile, z: tl.constexpr):
    """Columns of the statistics ``[N]`` of a tile, variable by variable, their class numbers, and which exist.

    Gaussian latents: mean and std of a sample take the place of two classes.
    """
    n = tl.arange(0, z.GROUPS * z.CLASSES)
    group = tile * z.GROUPS + n // z.CLASSES
    of = n % z.CLASSES
    if z.C > 0:
        return group * z.C + of, of, (group < z.S) & (of < z.C)
    else:
        return of * z.S + group, of, group < z.S


@triton.jit
def by_class(x, z: tl.constexpr):
    """``[rows, GROUPS·CLASSES]`` as ``[rows, GROUPS, CLASSES]``."""
    return tl.reshape(x, [x.shape[0], z.GROUPS, z.CLASSES])


@triton.jit
def spread(x, z: tl.constexpr):
    """``[rows, GROUPS]``, the same for every class, as ``[rows, GROUPS·CLASSES]``."""
    wide = tl.broadcast_to(x[:, :, None], [x.shape[0], z.GROUPS, z.CLASSES])
    return tl.reshape(wide, [x.shape[0], z.GROUPS * z.CLASSES])


@triton.jit
def tile_sums(sums, rows, row_mask, B, TILES: tl.constexpr):
    """The two numbers that every column tile has left for its rows, ``[tiles, BM]`` each, and the tiles' numbers."""
    PADDED: tl.constexpr = triton.next_power_of_2(TILES)
    tile = tl.arange(0, PADDED)
    mask = (tile < TILES)[:, None] & row_mask[None, :]
    at = sums + tile[:, None] * B + rows[None, :]
    first = tl.load(at, mask, 0.0, cache_modifier=".cg")
    second = tl.load(at + TILES * B, mask, 0.0, cache_modifier=".cg")
    return first, second, tile

"""The posterior scan's recurrence as five device functions, one a phase of :mod:`apv_fast.recurrence.phases`.

A phase walks over its tiles with a stride of the number of programs, so it is right for any number of them, and reads
only what earlier phases have written: between two phases lies a grid barrier (:mod:`apv_fast.kernels.parts.grid`) or
the end of a launch. All products have 16 to 64 rows; what a tile needs of the weights streams from L2.

Phases are real functions. Inlined into the loop over time, what each computes from the thread's number alone was kept
in registers through all the others (255 a thread, with spills, instead of 136), and a call is one more thing that no
load can be moved across.
"""
# Kernels are Triton, not Python.
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def, assignment, misc, no-redef"

from __future__ import annotations

import triton
import triton.language as tl

from apv_fast.reference.rssm_step import LAYER_NORM_EPS, UPDATE_BIAS

from .pointwise import elu, gumbel, normal, sigmoid, tanh
from .rssm_products import by_class, gathered, latent_columns, product, rows_of, spread, tile_sums
from .tiles import only_if, rounded

PHASES = 5
EPS: tl.constexpr = tl.constexpr(LAYER_NORM_EPS)
BIAS: tl.constexpr = tl.constexpr(UPDATE_BIAS)


@triton.jit
def _store_x(f, x, t, rows, columns, mask, T, z: tl.constexpr):
    """x_t for the backward pass, and beside h for the GRU's product."""
    x = rounded(elu(x), f.x.dtype.element_ty)
    tl.store(f.x + (rows * T + t)[:, None] * z.H + columns[None, :], x, mask)
    tl.store(f.joined + rows[:, None] * (z.H + z.D) + columns[None, :], x, mask)


@triton.jit(noinline=True)
def input_phase(pid, programs, t, B, T, f, z: tl.constexpr):
    """1: x_t = elu(in_x_t + keep_t·W_stoch z_{t-1})."""
    if z.C > 0:
        BM: tl.constexpr = z.GATHER_ROWS
        BN: tl.constexpr = z.GATHER_COLUMNS
    else:
        BM: tl.constexpr = z.BM
        BN: tl.constexpr = z.COLUMNS
    TILES: tl.constexpr = (z.H + BN - 1) // BN
    for tile in range(pid, ((B + BM - 1) // BM) * TILES, programs):
        rows = tl.arange(0, BM).to(tl.int64) + tile // TILES * BM
        columns = (tile % TILES) * BN + tl.arange(0, BN)
        row_mask, column_mask = rows < B, columns < z.H
        mask = row_mask[:, None] & column_mask[None, :]
        at = rows * T + t
        x = tl.load(f.in_x + at[:, None] * z.H + columns[None, :], mask, 0.0).to(f.deter.dtype.element_ty)
        seen = only_if(t > 0, tl.load(f.keep + at, row_mask, 0) != 0)
        if z.C > 0:
            x += gathered(f.sample, f.stoch_weight, rows, seen, columns, column_mask, z.S, z.H)
        else:
            x += product(f.sample + rows * z.S, seen, f.stoch_weight + columns * z.S, column_mask, z.S, z)
        _store_x(f, x, t, rows, columns, mask, T, z)


@triton.jit(noinline=True)
def gru_phase(pid, programs, t, B, T, f, z: tl.constexpr):
    """2: parts_t = W_gru [x_t, keep_t·h_{t-1}] + b_gru, and each tile's mean and squared deviations.

    A tile has the columns of r, c and g of the same units, and a masked fourth quarter.
    """
    TILES: tl.constexpr = (z.D + z.UNITS - 1) // z.UNITS
    K: tl.constexpr = z.H + z.D
    for tile in range(pid, ((B + z.BM - 1) // z.BM) * TILES, programs):
        rows, row_mask = rows_of(tile // TILES, B, z.BM)
        n = tl.arange(0, 4 * z.UNITS)
        unit = (tile % TILES) * z.UNITS + n % z.UNITS
        columns = n // z.UNITS * z.D + unit
        inside = (unit < z.D) & (n // z.UNITS < 3)
        mask = row_mask[:, None] & inside[None, :]
        parts = product(f.joined + rows * K, row_mask, f.gru_weight + columns.to(tl.int64) * K, inside, K, z)
        parts += tl.load(f.gru_bias + columns, inside, 0.0).to(parts.dtype)[None, :]
        tl.store(f.parts + (rows * T + t)[:, None] * (3 * z.D) + columns[None, :], parts, mask)
        count = 3 * tl.minimum(z.D - (tile % TILES) * z.UNITS, z.UNITS)
        mean = tl.sum(tl.where(inside[None, :], parts, 0.0), 1) / count
        deviation = tl.where(inside[None, :], parts - mean[:, None], 0.0)
        at = f.sums + (tile % TILES) * B + rows
        tl.store(at, mean, row_mask)
        tl.store(at + TILES * B, tl.sum(deviation * deviation, 1), row_mask)


@triton.jit(noinline=True)
def state_phase(pid, programs, t, B, T, f, z: tl.constexpr):
    """3: h_t = gates(LayerNorm(parts_t), keep_t·h_{t-1}); the tiles' statistics are merged by Chan's formula."""
    SUMS: tl.constexpr = (z.D + z.UNITS - 1) // z.UNITS
    UNITS: tl.constexpr = z.UNITS * (z.BM // z.ROWS)
    TILES: tl.constexpr = (z.D + UNITS - 1) // UNITS
    for tile in range(pid, ((B + z.ROWS - 1) // z.ROWS) * TILES, programs):
        rows, row_mask = rows_of(tile // TILES, B, z.ROWS)
        means, squares, other = tile_sums(f.sums, rows, row_mask, B, SUMS)
        count = (3 * tl.minimum(tl.maximum(z.D - other * z.UNITS, 0), z.UNITS)).to(means.dtype)[:, None]
        mean = tl.sum(count * means, 0) / (3 * z.D)
        shift = means - mean[None, :]
        rstd = 1.0 / tl.sqrt(tl.sum(squares + count * shift * shift, 0) / (3 * z.D) + EPS)
        at = rows * T + t
        first = only_if(tile % TILES == 0, row_mask)
        tl.store(f.norm + at * 2, mean, first)
        tl.store(f.norm + at * 2 + 1, rstd, first)

        unit = (tile % TILES) * UNITS + tl.arange(0, UNITS)
        inside = unit < z.D
        mask = row_mask[:, None] & inside[None, :]
        gates = ()
        for gate in tl.static_range(3):
            columns = gate * z.D + unit
            part = tl.load(f.parts + at[:, None] * (3 * z.D) + columns[None, :], mask, 0.0, cache_modifier=".cg")
            scale = tl.load(f.norm_weight + columns, inside, 0.0).to(part.dtype)
            offset = tl.load(f.norm_bias + columns, inside, 0.0).to(part.dtype)
            gates += ((part - mean[:, None]) * rstd[:, None] * scale[None, :] + offset[None, :],)
        keep = tl.load(f.keep + at, row_mask, 0) != 0
        before_mask = mask & keep[:, None]
        before = tl.load(f.start + rows[:, None] * z.D + unit[None, :], only_if(t == 0, before_mask), 0.0)
        earlier = f.deter + (at - 1)[:, None] * z.D + unit[None, :]
        before += tl.load(earlier, only_if(t > 0, before_mask), 0.0, cache_modifier=".cg")
        update = sigmoid(gates[2] + BIAS)
        h = update * tanh(sigmoid(gates[0]) * gates[1]) + (1.0 - update) * before
        tl.store(f.deter + at[:, None] * z.D + unit[None, :], h, mask)
        low = rounded(h, f.hidden.dtype.element_ty)
        tl.store(f.hidden + ((t % 2) * B + rows)[:, None] * z.D + unit[None, :], low, mask)
        after = tl.load(f.keep + at + 1, only_if(t + 1 < T, row_mask), 0) != 0
        joined = f.joined + rows[:, None] * (z.H + z.D) + z.H + unit[None, :]
        tl.store(joined, tl.where(after[:, None], low, low * 0), mask)


@triton.jit(noinline=True)
def look_phase(pid, programs, t, B, T, f, z: tl.constexpr, link, lower: tl.constexpr):
    """4: y_t = elu(in_obs_t + W_obs h_t), and what ``link`` adds of a lower model's step t; ``lower`` is its shape."""
    TILES: tl.constexpr = (z.H + z.COLUMNS - 1) // z.COLUMNS
    for tile in range(pid, ((B + z.BM - 1) // z.BM) * TILES, programs):
        rows, row_mask = rows_of(tile // TILES, B, z.BM)
        columns = (tile % TILES) * z.COLUMNS + tl.arange(0, z.COLUMNS)
        inside = columns < z.H
        mask = row_mask[:, None] & inside[None, :]
        half = (t % 2) * B + rows
        y = product(f.hidden + half * z.D, row_mask, f.obs_weight + columns.to(tl.int64) * z.D, inside, z.D, z)
        at = (rows * T + t)[:, None] * z.H + columns[None, :]
        y += tl.load(f.in_obs + at, mask, 0.0).to(y.dtype)
        if link is not None:
            weights = link.deter_weight + columns.to(tl.int64) * lower.D
            y += product(link.hidden + half * lower.D, row_mask, weights, inside, lower.D, z)
            if lower.C > 0:
                y += gathered(link.sample, link.stoch_weight, rows, row_mask, columns, inside, lower.S, z.H)
            else:
                weights = link.stoch_weight + columns * lower.S
                y += product(link.sample + rows * lower.S, row_mask, weights, inside, lower.S, z)
        tl.store(f.y + at, rounded(elu(y), f.y.dtype.element_ty), mask)


@triton.jit
def _sample_classes(f, rows, row_mask, tile, t, T, z: tl.constexpr):
    """One-hot samples of a tile's variables, and the rows of weights that they choose."""
    columns, of, inside = latent_columns(tile, z)
    mask = row_mask[:, None] & inside[None, :]
    element = (rows * T + t)[:, None] * z.L + columns[None, :]
    score = tl.load(f.stats + element, mask, float("-inf"), cache_modifier=".cg")
    if z.NOISE == "given":
        score += tl.load(f.noise + element, mask, 0.0)
    elif z.NOISE == "seed":
        score += gumbel(tl.load(f.noise), element).to(score.dtype)
    chosen = tl.minimum(tl.argmax(by_class(score, z), 2), z.C - 1)  # NaNs must not lead outside
    group = tile * z.GROUPS + tl.arange(0, z.GROUPS)
    group_mask = row_mask[:, None] & (group < z.S)[None, :]
    tl.store(f.sample + rows[:, None] * z.S + group[None, :], group[None, :] * z.C + chosen, group_mask)
    tl.store(f.stoch + element, (spread(chosen, z) == of[None, :]).to(f.stoch.dtype.element_ty), mask)


@triton.jit
def _sample_normal(f, rows, row_mask, tile, t, T, z: tl.constexpr):
    """Gaussian samples of a tile's variables, also as operands of the next step's product."""
    group = tile * z.GROUPS + tl.arange(0, z.GROUPS)
    mask = row_mask[:, None] & (group < z.S)[None, :]
    at = rows * T + t
    sample = tl.load(f.stats + at[:, None] * z.M + group[None, :], mask, 0.0, cache_modifier=".cg")
    element = at[:, None] * z.S + group[None, :]
    if z.NOISE != "none":
        raw = tl.load(f.stats + at[:, None] * z.M + z.S + group[None, :], mask, 0.0, cache_modifier=".cg")
        if z.NOISE == "given":
            noise = tl.load(f.noise + element, mask, 0.0)
        else:
            noise = normal(tl.load(f.noise), element).to(sample.dtype)
        sample += (2.0 * sigmoid(raw * 0.5) + z.MIN_STD) * noise
    tl.store(f.stoch + element, sample, mask)
    low = rounded(sample, f.sample.dtype.element_ty)
    tl.store(f.sample + rows[:, None] * z.S + group[None, :], low, mask)


@triton.jit(noinline=True)
def sample_phase(pid, programs, t, B, T, f, z: tl.constexpr):
    """5: stats_t = W_dist y_t + b_dist; z_t = sample(stats_t). A tile has all classes of its variables.

    The sample is drawn from the statistics as stored: every warp holds the whole of a product's result, and would draw
    the noise of all of it; loaded again, it is spread over the threads.
    """
    TILES: tl.constexpr = (z.S + z.GROUPS - 1) // z.GROUPS
    for tile in range(pid, ((B + z.BM - 1) // z.BM) * TILES, programs):
        rows, row_mask = rows_of(tile // TILES, B, z.BM)
        columns, _, inside = latent_columns(tile % TILES, z)
        at = rows * T + t
        stats = product(f.y + at * z.H, row_mask, f.dist_weight + columns.to(tl.int64) * z.H, inside, z.H, z)
        stats += tl.load(f.dist_bias + columns, inside, 0.0).to(stats.dtype)[None, :]
        tl.store(f.stats + at[:, None] * z.M + columns[None, :], stats, row_mask[:, None] & inside[None, :])
        tl.debug_barrier()
        if z.C > 0:
            _sample_classes(f, rows, row_mask, tile % TILES, t, T, z)
        else:
            _sample_normal(f, rows, row_mask, tile % TILES, t, T, z)


@triton.jit
def forward_phase(PHASE: tl.constexpr, pid, programs, t, B, T, f, z: tl.constexpr, link, lower: tl.constexpr):
    """Phase 1 to 5 of step t, for the tiles of program ``pid``; ``link`` and ``lower`` may be None."""
    if PHASE == 1:
        input_phase(pid, programs, t, B, T, f, z)
    elif PHASE == 2:
        gru_phase(pid, programs, t, B, T, f, z)
    elif PHASE == 3:
        state_phase(pid, programs, t, B, T, f, z)
    elif PHASE == 4:
        look_phase(pid, programs, t, B, T, f, z, link, lower)
    else:
        sample_phase(pid, programs, t, B, T, f, z)

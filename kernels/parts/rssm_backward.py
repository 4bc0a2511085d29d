"""The posterior scan's backward recurrence as five device functions, in phases of :mod:`apv_fast.recurrence.phases`.

Its phase 4 is two here: every program reads the whole of dparts_t as an operand, and to make it again in each of them
from float32 would move 52 MB a step at full size (132 programs, B = 16) where a barrier more costs about 1 µs.

No atomics and no order that depends on timing: LayerNorm's sums are merged from one number a tile in a fixed order, and
the gradients of its scale and offset are added up, a step at a time, by the program that owns the columns.
"""
# Kernels are Triton, not Python.
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def, assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl

from .pointwise import elu_grad, exp, normal, sigmoid, tanh
from .rssm_forward import BIAS
from .rssm_products import by_class, latent_columns, product, rows_of, spread, tile_sums
from .tiles import only_if, rounded

PHASES = 5


@triton.jit
def _through_sample(g, at, row_mask, columns, inside, dz, z: tl.constexpr):
    """Gradient of the logits through a one-hot sample, as if it were softmax(logit)."""
    mask = row_mask[:, None] & inside[None, :]
    logit = tl.load(g.stats + at[:, None] * z.M + columns[None, :], mask, 0.0)
    logit = tl.where(inside[None, :], logit, float("-inf"))
    top = tl.max(by_class(logit, z), 2)
    e = tl.where(inside[None, :], exp(logit - spread(tl.where(top > float("-inf"), top, 0.0), z)), 0.0)
    total = tl.sum(by_class(e, z), 2)
    p = e / spread(tl.where(total > 0.0, total, 1.0), z)
    return p * (dz - spread(tl.sum(by_class(p * dz, z), 2), z))


@triton.jit
def _stoch_grad(g, rows, row_mask, t, columns, inside, B, T, z: tl.constexpr, link, upper: tl.constexpr):
    """dz = of_stoch_t + keep_{t+1}·W_stochᵀ dx_{t+1}, and what ``link`` gives; ``[BM, N]``."""
    at = rows * T + t
    later = only_if(t + 1 < T, row_mask)
    later = later & (tl.load(g.keep + at + 1, later, 0) != 0)
    weights = g.stoch_weight + columns.to(tl.int64) * z.H
    dz = product(g.dx + (at + 1) * z.H, later, weights, inside, z.H, z)
    if link is not None:
        weights = link.stoch_weight + columns.to(tl.int64) * upper.H
        dz += product(link.dy + at * upper.H, row_mask, weights, inside, upper.H, z)
    if g.of_stoch is not None:
        mask = row_mask[:, None] & inside[None, :]
        dz += tl.load(g.of_stoch + at[:, None] * z.L + columns[None, :], mask, 0.0)
    return dz


@triton.jit(noinline=True)
def sample_back_phase(pid, programs, t, B, T, g, z: tl.constexpr, link, upper: tl.constexpr):
    """1: dstats_t = of_stats_t + (dz through the sample)."""
    TILES: tl.constexpr = (z.S + z.GROUPS - 1) // z.GROUPS
    BM: tl.constexpr = z.BM
    BN: tl.constexpr = z.GROUPS * z.CLASSES
    for tile in range(pid, ((B + z.BM - 1) // z.BM) * TILES, programs):
        rows, row_mask = rows_of(tile // TILES, B, z.BM)
        at = rows * T + t
        columns, of, inside = latent_columns(tile % TILES, z)
        mask = row_mask[:, None] & inside[None, :]
        dstats = tl.zeros([BM, BN], g.stats.dtype.element_ty)
        if z.C > 0:
            if z.NOISE != "none":  # a mode has no gradient
                dz = _stoch_grad(g, rows, row_mask, t, columns, inside, B, T, z, link, upper)
                dstats += _through_sample(g, at, row_mask, columns, inside, dz, z)
        else:  # both columns of a sample get its dz: mean and std
            sample = columns % z.S
            dz = _stoch_grad(g, rows, row_mask, t, sample, inside, B, T, z, link, upper)
            slope = tl.zeros([BM, BN], dz.dtype)
            if z.NOISE != "none":
                raw = tl.load(g.stats + at[:, None] * z.M + z.S + sample[None, :], mask, 0.0)
                s = sigmoid(raw * 0.5)
                element = at[:, None] * z.S + sample[None, :]
                if z.NOISE == "given":
                    slope = tl.load(g.noise + element, mask, 0.0) * s * (1.0 - s)
                else:
                    slope = normal(tl.load(g.noise), element).to(dz.dtype) * s * (1.0 - s)
            dstats += dz * tl.where((of == 0)[None, :], 1.0, slope)
        if g.of_stats is not None:
            dstats += tl.load(g.of_stats + at[:, None] * z.M + columns[None, :], mask, 0.0)
        out = g.dstats + at[:, None] * z.M + columns[None, :]
        tl.store(out, rounded(dstats, g.dstats.dtype.element_ty), mask)


@triton.jit(noinline=True)
def look_back_phase(pid, programs, t, B, T, g, z: tl.constexpr):
    """2: dy_t = elu'(y_t)·W_distᵀ dstats_t."""
    TILES: tl.constexpr = (z.H + z.COLUMNS - 1) // z.COLUMNS
    for tile in range(pid, ((B + z.BM - 1) // z.BM) * TILES, programs):
        rows, row_mask = rows_of(tile // TILES, B, z.BM)
        columns = (tile % TILES) * z.COLUMNS + tl.arange(0, z.COLUMNS)
        inside = columns < z.H
        at = rows * T + t
        dy = product(g.dstats + at * z.M, row_mask, g.dist_weight + columns.to(tl.int64) * z.M, inside, z.M, z)
        cell, mask = at[:, None] * z.H + columns[None, :], row_mask[:, None] & inside[None, :]
        dy *= elu_grad(tl.load(g.y + cell, mask, 0.0).to(dy.dtype))
        tl.store(g.dy + cell, rounded(dy, g.dy.dtype.element_ty), mask)


@triton.jit(noinline=True)
def state_back_phase(pid, programs, t, B, T, g, z: tl.constexpr, link, upper: tl.constexpr):
    """3: dh_t = of_deter_t + W_obsᵀ dy_t + carry; through the gates to the normalised parts, with LayerNorm's sums."""
    TILES: tl.constexpr = (z.D + z.UNITS - 1) // z.UNITS
    BM: tl.constexpr = z.BM
    for tile in range(pid, ((B + z.BM - 1) // z.BM) * TILES, programs):
        rows, row_mask = rows_of(tile // TILES, B, z.BM)
        unit = (tile % TILES) * z.UNITS + tl.arange(0, z.UNITS)
        inside = unit < z.D
        mask = row_mask[:, None] & inside[None, :]
        at = rows * T + t
        cell, state = at[:, None] * z.D + unit[None, :], rows[:, None] * z.D + unit[None, :]
        dh = product(g.dy + at * z.H, row_mask, g.obs_weight + unit.to(tl.int64) * z.H, inside, z.H, z)
        if link is not None:
            weights = link.deter_weight + unit.to(tl.int64) * upper.H
            dh += product(link.dy + at * upper.H, row_mask, weights, inside, upper.H, z)
        dh += tl.load(g.carry + state, mask, 0.0, cache_modifier=".cg")
        if g.of_deter is not None:
            dh += tl.load(g.of_deter + cell, mask, 0.0)

        mean = tl.load(g.norm + at * 2, row_mask, 0.0)
        rstd = tl.load(g.norm + at * 2 + 1, row_mask, 0.0)
        normal_, scales, gates = (), (), ()
        for gate in tl.static_range(3):
            columns = gate * z.D + unit
            part = tl.load(g.parts + at[:, None] * (3 * z.D) + columns[None, :], mask, 0.0)
            scale = tl.load(g.norm_weight + columns, inside, 0.0).to(part.dtype)
            offset = tl.load(g.norm_bias + columns, inside, 0.0).to(part.dtype)
            xhat = (part - mean[:, None]) * rstd[:, None]
            normal_ += (xhat,)
            scales += (scale,)
            gates += (xhat * scale[None, :] + offset[None, :],)
        before_mask = mask & (tl.load(g.keep + at, row_mask, 0) != 0)[:, None]
        before = tl.load(g.start + state, only_if(t == 0, before_mask), 0.0)
        before += tl.load(g.deter + cell - z.D, only_if(t > 0, before_mask), 0.0)
        reset, update = sigmoid(gates[0]), sigmoid(gates[2] + BIAS)
        c = tanh(reset * gates[1])
        dc = dh * update * (1.0 - c * c)
        through = (
            dc * gates[1] * reset * (1.0 - reset),
            dc * reset,
            dh * (c - before) * update * (1.0 - update),
        )
        tl.store(g.direct + state, (1.0 - update) * dh, mask)
        first = tl.zeros([BM], dh.dtype)
        second = tl.zeros([BM], dh.dtype)
        for gate in tl.static_range(3):
            columns = gate * z.D + unit
            dnorm, xhat = tl.where(mask, through[gate], 0.0), normal_[gate]
            dscaled = dnorm * scales[gate][None, :]
            tl.store(g.dscaled + rows[:, None] * (3 * z.D) + columns[None, :], dscaled, mask)
            first += tl.sum(dscaled, 1)
            second += tl.sum(dscaled * xhat, 1)
            total = g.dnorm + (tile // TILES) * (6 * z.D) + columns
            tl.store(total, tl.load(total, inside, 0.0) + tl.sum(dnorm * xhat, 0), inside)
            total += 3 * z.D
            tl.store(total, tl.load(total, inside, 0.0) + tl.sum(dnorm, 0), inside)
        sums = g.sums + (tile % TILES) * B + rows
        tl.store(sums, first, row_mask)
        tl.store(sums + TILES * B, second, row_mask)


@triton.jit(noinline=True)
def norm_back_phase(pid, programs, t, B, T, g, z: tl.constexpr):
    """4: dparts_t = LayerNorm'(dscaled)."""
    BN: tl.constexpr = 2 * z.BACK * (z.BM // z.ROWS)
    TILES: tl.constexpr = (3 * z.D + BN - 1) // BN
    SUMS: tl.constexpr = (z.D + z.UNITS - 1) // z.UNITS
    for tile in range(pid, ((B + z.ROWS - 1) // z.ROWS) * TILES, programs):
        rows, row_mask = rows_of(tile // TILES, B, z.ROWS)
        columns = (tile % TILES) * BN + tl.arange(0, BN)
        mask = row_mask[:, None] & (columns < 3 * z.D)[None, :]
        at = rows * T + t
        first, second, _ = tile_sums(g.sums, rows, row_mask, B, SUMS)
        mean_1, mean_2 = tl.sum(first, 0) / (3 * z.D), tl.sum(second, 0) / (3 * z.D)
        mean = tl.load(g.norm + at * 2, row_mask, 0.0)
        rstd = tl.load(g.norm + at * 2 + 1, row_mask, 0.0)
        cell = at[:, None] * (3 * z.D) + columns[None, :]
        xhat = (tl.load(g.parts + cell, mask, 0.0) - mean[:, None]) * rstd[:, None]
        dscaled = tl.load(g.dscaled + rows[:, None] * (3 * z.D) + columns[None, :], mask, 0.0, cache_modifier=".cg")
        dparts = rstd[:, None] * (dscaled - mean_1[:, None] - xhat * mean_2[:, None])
        tl.store(g.dparts + cell, rounded(dparts, g.dparts.dtype.element_ty), mask)


@triton.jit(noinline=True)
def gru_back_phase(pid, programs, t, B, T, g, z: tl.constexpr):
    """5: [dx_t, carry] = W_gruᵀ dparts_t; dx_t ·= elu'(x_t); carry = keep_t·(carry + direct)."""
    K: tl.constexpr = 3 * z.D
    TILES: tl.constexpr = (z.H + z.D + z.BACK - 1) // z.BACK
    for tile in range(pid, ((B + z.BM - 1) // z.BM) * TILES, programs):
        rows, row_mask = rows_of(tile // TILES, B, z.BM)
        n = (tile % TILES) * z.BACK + tl.arange(0, z.BACK)
        at = rows * T + t
        both = product(g.dparts + at * K, row_mask, g.gru_weight + n.to(tl.int64) * K, n < z.H + z.D, K, z)
        cell, mask = at[:, None] * z.H + n[None, :], row_mask[:, None] & (n < z.H)[None, :]
        dx = both * elu_grad(tl.load(g.x + cell, mask, 0.0).to(both.dtype))
        tl.store(g.dx + cell, rounded(dx, g.dx.dtype.element_ty), mask)
        mask = row_mask[:, None] & ((n >= z.H) & (n < z.H + z.D))[None, :]
        state = rows[:, None] * z.D + (n - z.H)[None, :]
        keep = (tl.load(g.keep + at, row_mask, 0) != 0)[:, None]
        carry = both + tl.load(g.direct + state, mask, 0.0, cache_modifier=".cg")
        tl.store(g.carry + state, tl.where(keep, carry, 0.0), mask)


@triton.jit
def backward_phase(PHASE: tl.constexpr, pid, programs, t, B, T, g, z: tl.constexpr, link, upper: tl.constexpr):
    """Phase 1 to 5 of step t, for the tiles of program ``pid``; ``link`` and ``upper`` may be None."""
    if PHASE == 1:
        sample_back_phase(pid, programs, t, B, T, g, z, link, upper)
    elif PHASE == 2:
        look_back_phase(pid, programs, t, B, T, g, z)
    elif PHASE == 3:
        state_back_phase(pid, programs, t, B, T, g, z, link, upper)
    elif PHASE == 4:
        norm_back_phase(pid, programs, t, B, T, g, z)
    else:
        gru_back_phase(pid, programs, t, B, T, g, z)

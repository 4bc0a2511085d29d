r"""Kernels of the nearest-neighbour bonus: a filter on tensor cores, its exact check, and an exact scan for the rest.

Distances are ‖q - k‖². Every query lies in the keys itself, and features share an offset, so the selection must be that
of exact differences. But most keys are far away, and being far can be proven cheaply.

**Filter.** It takes BM queries and every S-th key. With ``c`` the mean of its queries, ``a = q - c``, ``b = k - c``::

    ‖q - k‖² ≥ bound = (1 - ε)·(‖a‖² + ‖b‖²) - 2·a·b - 2⁻¹⁰⁰            a·b in tf32

ε covers all rounding (Cauchy: Σ|aᵢbᵢ| ≤ (‖a‖² + ‖b‖²)/2, so an error of δ a product costs at most δ·(‖a‖² + ‖b‖²)):
tf32 by truncation, 2⁻⁹; fp32 sums of up to 256 terms and the subtraction of c, below 2⁻¹⁵; ε = 1.125·2⁻⁹. The last
term covers underflow. Because ``c`` is near the queries, ``a`` is of the size of their distances and the bound is tight
for neighbours; a common offset cancels before anything is rounded to tf32. A bound that is negative or not finite
becomes 0, which rules nothing out. The K keys with the smallest bounds are kept, each as one integer: the bound's upper
bits (truncated, so still a bound) above 12 bits of position. As positive floats order like integers, selection is
integer minimum, and all numbers of a row differ, so no index is carried and "all but those taken" is a subtraction.

**Verify.** A program has one query. It walks the kept keys of all S lists in the order of their bounds and computes the
exact Σ(q - k)² of each, until the next bound is not below the k-th smallest distance so far: about k + 2 rows are read.
A key that no list kept has a bound at least the largest in its list. So the answer is proven if the k-th distance is
not above the smallest of those; else the query is marked for the scan. Keys are dealt to lists one by one, because
windows next to each other in time are neighbours: no list gets all of them.

**Scan.** The exact distances of all keys to the marked queries (or to all: float64, large k, large d).

In the lists of verify and scan distances are the bits of positive floats; a NaN is above infinity, an empty slot above
that, and a slot beyond ``wanted`` is -1 and never replaced.
"""
# Kernels are Triton, not Python: arguments are pointers, and a tuple grows.
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import triton
import triton.language as tl

POSITION_BITS = 12  # of a kept key: its place among its split's keys
SHRINK = tl.constexpr(1 - 1.125 * 2.0**-9)  # 1 - ε
TINY = tl.constexpr(2.0**-100)
HUGE = tl.constexpr(3e38)
POSITION = tl.constexpr((1 << POSITION_BITS) - 1)
INFINITY = tl.constexpr(0x7F800000)  # its bits: no kept key is as large
EMPTY = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _rows(base, row, stride_row, column, stride_column, inside, d, FULL: tl.constexpr, ACC: tl.constexpr):
    """[rows, columns] at the precision of the arithmetic; 0 where not ``inside`` and, unless FULL, beyond column d."""
    at = base + row.to(tl.int64)[:, None] * stride_row + column.to(tl.int64)[None, :] * stride_column
    mask = inside[:, None]
    if not FULL:
        mask = mask & (column < d)[None, :]
    return tl.load(at, mask, other=0.0).to(ACC)


@triton.jit
def _count(filled, n, HAS_FILLED: tl.constexpr):
    """How many keys there are: n, or what the device says."""
    if HAS_FILLED:
        n = tl.minimum(tl.load(filled), n).to(tl.int32)
    return n


@triton.jit
def _take(x, best, limit, ROUNDS: tl.constexpr):
    """Put the numbers of ``x`` [rows, ...] that belong to each row's K smallest into ``best`` [rows, K].

    ``limit`` is the largest of each row of ``best``. A round takes the next smallest of every row that still has one
    below it. Unsigned x - start wraps for what was taken, so that its minimum is over the rest; where nothing is left,
    the sum wraps back below start. Whether any row goes on takes a barrier, so it is asked once in ROUNDS; a round too
    many changes nothing.
    """
    low = tl.min(x, 1)
    start = low * 0
    going = low.to(tl.int32, bitcast=True) < limit
    while tl.max(going.to(tl.int32), 0) > 0:
        for _ in tl.static_range(ROUNDS):
            replaced = going[:, None] & (best == limit[:, None])
            best = tl.where(replaced, low.to(tl.int32, bitcast=True)[:, None], best)
            limit = tl.max(best, 1)
            start = tl.where(going, low + 1, start)
            low = start + tl.min(x - start[:, None], 1)
            going = (low.to(tl.int32, bitcast=True) < limit) & (low >= start)
    return best, limit


@triton.jit(do_not_specialize=["q", "n", "splits", "d"])
def filter_kernel(
    query, keys, filled, kept,  # [Q, D], [N, D], [] int64 or nothing, [Q, splits, K] int32
    q, n, splits, d,
    query_0, query_1, keys_0, keys_1,  # strides, in elements
    FULL: tl.constexpr, K: tl.constexpr, HAS_FILLED: tl.constexpr, EXCLUDE_SELF: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, CHUNKS: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """The K keys of split ``program_id(1)`` with the smallest bounds, for BM queries; FULL: d is CHUNKS·BD."""
    split = tl.program_id(1)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = row < q
    share = 1.0 / tl.minimum(q - tl.program_id(0) * BM, BM).to(tl.float32)
    a, centre = (), ()
    square = tl.zeros([BM, BD], tl.float32)
    for i in tl.static_range(CHUNKS):
        column = i * BD + tl.arange(0, BD)
        this = _rows(query, row, query_0, column, query_1, inside, d, FULL, tl.float32)
        mean = tl.sum(this * share, 0)
        this = this - mean[None, :]
        square += this * this
        a += (this,)
        centre += (mean,)
    norm_a = tl.sum(square, 1) * SHRINK - TINY

    slot = tl.arange(0, K)
    best = tl.where(inside[:, None], (-slot + EMPTY)[None, :], 0)  # all different; nothing is below 0
    limit = tl.max(best, 1)
    count = _count(filled, n, HAS_FILLED)
    mine = (count - split + splits - 1) // splits  # keys split, split + splits, ...
    for first in range(0, mine, BN):
        position = first + tl.arange(0, BN)
        key = split + position * splits
        mask = position < mine
        dot = tl.zeros([BM, BN], tl.float32)
        square_b = tl.zeros([BN, BD], tl.float32)
        for i in tl.static_range(CHUNKS):
            column = i * BD + tl.arange(0, BD)
            b = _rows(keys, key, keys_0, column, keys_1, mask, d, FULL, tl.float32) - centre[i][None, :]
            square_b += b * b
            dot = tl.dot(a[i], tl.trans(b), dot, input_precision="tf32")
        norm_b = tl.sum(square_b, 1) * SHRINK
        bound = norm_a[:, None] + norm_b[None, :] - 2.0 * dot
        bound = tl.where((bound > 0.0) & (bound < HUGE), bound, 0.0)
        x = (bound.to(tl.int32, bitcast=True) & ~POSITION) | position[None, :]
        present = mask[None, :]
        if EXCLUDE_SELF:
            present = present & (key[None, :] != row[:, None])
        x = tl.where(present, x, EMPTY).to(tl.uint32, bitcast=True)
        best, limit = _take(x, best, limit, ROUNDS)

    at = (row.to(tl.int64) * splits + split)[:, None] * K + slot[None, :]
    tl.store(kept + at, best, inside[:, None])


@triton.jit
def _wanted(row, count, k, EXCLUDE_SELF: tl.constexpr):
    """How many neighbours each query gets: k, or all that there are."""
    others = row * 0 + count
    if EXCLUDE_SELF:
        others = tl.where(row < count, count - 1, count)
    return tl.minimum(others, k)


@triton.jit
def _bits(distance, NAN: tl.constexpr, INTEGER: tl.constexpr):
    """Squared distances as integers of the same order, NaN last."""
    return tl.where(distance == distance, distance.to(INTEGER, bitcast=True), NAN)


@triton.jit
def quotient(x, y):
    """x / y, correctly rounded: the plain operator is approximate in float32."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def _root(best, ACC: tl.constexpr):
    """Distances, correctly rounded, of squared ones; 0 for an unused slot."""
    square = tl.maximum(best, 0).to(ACC, bitcast=True)
    if square.dtype == tl.float64:
        return tl.sqrt(square)
    else:
        return tl.sqrt_rn(square)  # tl.sqrt is approximate in float32


@triton.jit
def _reduced(best, wanted, mean, ACC: tl.constexpr):
    """Mean, or last, of the square roots of the ``wanted`` distances that each row of ``best`` lists; 0 of none."""
    total = tl.sum(_root(best, ACC), 1)
    last = _root(tl.max(best, 1), ACC)
    return tl.where(mean != 0, quotient(total, tl.maximum(wanted, 1).to(ACC)), last)


# Strides are not specialized: sums over d have the same order, so results the same bits, for every layout in memory.
@triton.jit(do_not_specialize=["q", "n", "splits", "k", "d", "mean", "query_0", "query_1", "keys_0", "keys_1"])
def verify_kernel(
    query, keys, filled, kept, result, unproven,  # ..., [Q, splits, K] int32, [Q] float32, [Q] int32
    q, n, splits, k, d, mean,
    query_0, query_1, keys_0, keys_1,  # strides, in elements
    K: tl.constexpr, HAS_FILLED: tl.constexpr, EXCLUDE_SELF: tl.constexpr,
    BQ: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Exact distances of kept keys while their bounds allow; BS ≥ splits lists, BK ≥ k, BD ≥ d."""
    row = tl.program_id(0) * BQ + tl.arange(0, BQ)
    inside = row < q
    slot = tl.arange(0, BS * K)
    listed = inside[:, None] & (slot < splits * K)[None, :]
    x = tl.load(kept + row.to(tl.int64)[:, None] * (splits * K) + slot[None, :], listed, other=EMPTY)
    ruled_out = tl.min(tl.max(tl.reshape(x, [BQ, BS, K]), 2), 1)  # keys that no list kept have at least this bound
    wanted = _wanted(row, _count(filled, n, HAS_FILLED), k, EXCLUDE_SELF)
    column = tl.arange(0, BD)
    this = _rows(query, row, query_0, column, query_1, inside, d, False, tl.float32)

    best_slot = tl.arange(0, BK)
    best = tl.where(best_slot[None, :] < wanted[:, None], EMPTY, -1)
    limit, worst = tl.max(best, 1, return_indices=True)
    low, at = tl.min(x, 1, return_indices=True)
    going = (low < INFINITY) & ((low & ~POSITION) < limit)
    while tl.max(going.to(tl.int32), 0) > 0:
        key = (low & POSITION) * splits + at // K
        other = _rows(keys, key, keys_0, column, keys_1, going, d, False, tl.float32)
        difference = this - other
        distance = _bits(tl.sum(difference * difference, 1), INFINITY + 1, tl.int32)
        replaced = (going & (distance < limit))[:, None] & (best_slot[None, :] == worst[:, None])
        best = tl.where(replaced, distance[:, None], best)
        limit, worst = tl.max(best, 1, return_indices=True)
        x = tl.where(slot[None, :] == at[:, None], EMPTY, x)
        low, at = tl.min(x, 1, return_indices=True)
        going = (low < INFINITY) & ((low & ~POSITION) < limit)

    tl.store(result + row, _reduced(best, wanted, mean, tl.float32), inside)
    tl.store(unproven + row, (limit > (ruled_out & ~POSITION)).to(tl.int32), inside)


@triton.jit(do_not_specialize=["q", "n", "k", "d", "mean", "query_0", "query_1", "keys_0", "keys_1"])
def scan_kernel(
    query, keys, filled, unproven, result,  # ..., [Q] int32 or nothing, [Q] float32 or float64
    q, n, k, d, mean,
    query_0, query_1, keys_0, keys_1,  # strides, in elements
    HAS_FILLED: tl.constexpr, EXCLUDE_SELF: tl.constexpr, MARKED: tl.constexpr, ACC: tl.constexpr,
    BQ: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Exact distances of every key to BQ queries; with MARKED, only to those that are. BK ≥ k, CHUNKS·BD ≥ d."""
    DOUBLE: tl.constexpr = ACC.primitive_bitwidth == 64
    INTEGER: tl.constexpr = tl.int64 if DOUBLE else tl.int32
    NAN: tl.constexpr = 0x7FF0000000000001 if DOUBLE else INFINITY + 1
    BIGGEST: tl.constexpr = 0x7FFFFFFFFFFFFFFF if DOUBLE else EMPTY
    row = tl.program_id(0) * BQ + tl.arange(0, BQ)
    todo = row < q
    if MARKED:
        todo = tl.load(unproven + row, todo, other=0) != 0
    if tl.max(todo.to(tl.int32), 0) > 0:
        count = _count(filled, n, HAS_FILLED)
        wanted = _wanted(row, count, k, EXCLUDE_SELF)
        slot = tl.arange(0, BK)
        best = tl.where(slot[None, :] < wanted[:, None], BIGGEST, -1).to(INTEGER)
        limit, worst = tl.max(best, 1, return_indices=True)
        for first in range(0, count, BN):
            key = first + tl.arange(0, BN)
            square = tl.zeros([BQ, BN, BD], ACC)
            for i in range(CHUNKS):
                column = i * BD + tl.arange(0, BD)
                this = _rows(query, row, query_0, column, query_1, todo, d, False, ACC)
                other = _rows(keys, key, keys_0, column, keys_1, key < count, d, False, ACC)
                difference = this[:, None, :] - other[None, :, :]
                square += difference * difference
            present = (key < count)[None, :]
            if EXCLUDE_SELF:
                present = present & (key[None, :] != row[:, None])
            x = tl.where(present, _bits(tl.sum(square, 2), NAN, INTEGER), BIGGEST)

            low, at = tl.min(x, 1, return_indices=True)
            going = todo & (low < limit)
            while tl.max(going.to(tl.int32), 0) > 0:
                replaced = going[:, None] & (slot[None, :] == worst[:, None])
                best = tl.where(replaced, low[:, None], best)
                limit, worst = tl.max(best, 1, return_indices=True)
                x = tl.where(key[None, :] - first == at[:, None], BIGGEST, x)
                low, at = tl.min(x, 1, return_indices=True)
                going = todo & (low < limit)
        tl.store(result + row, _reduced(best, wanted, mean, ACC), todo)

"""``knn_bonus`` as three Triton launches: filter, verify, and a scan that returns at once where nothing is left to do.

The maths is in :mod:`apv_fast.kernels.parts.knn_select`. float64, k above 64, d above 256 and N above 262 144 take the
scan alone, which is exact for anything and several times slower.

Floor at Q = 2300, N = 4096, d = 128, k = 16 on an H100 (132 SMs at 1.755 GHz, 128 fp32 lanes each): exact differences
are 1.206 G subtractions and as many FMAs, 81 µs of issue slots before a single distance is selected, so they cannot
meet 80 µs. The product alone in fp32 takes 41 µs; in tf32 on tensor cores about 6 µs. With the filter there remain
about 18 rows of 512 bytes a query to read again (21 MB, from the second-level cache), and the selection, in which every
thread looks at its 32 numbers of a tile about 12 times.
"""
# Kernels are Triton, not Python.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from apv_fast.ops.knn_bonus import KnnBonus, like_bonus
from apv_fast.ops.op import Kernel

from . import interpreting
from .parts.knn_select import POSITION_BITS, filter_kernel, scan_kernel, verify_kernel
from .parts.tiles import on

MAX_K = 64  # of the filter: its lists live in registers
MAX_D = 256  # of the filter: a tile of queries lives in shared memory
MAX_SPLITS = 64  # of the filter: verify holds all lists of a query in registers
PROGRAMS_PER_SM = 3  # that filter's shared memory and registers allow


def blocks() -> dict[str, int]:
    """Block sizes: of the kernels on a GPU, and larger ones for the interpreter, which pays by the tile.

    ``splits`` is the least number of lists a query: with fewer, one list of k may have all its neighbours and prove
    nothing about the rest, which is right but means a scan.
    """
    if interpreting():
        return dict(filter_m=128, filter_n=128, rounds=1, splits=2, verify=64, scan_q=32, scan_n=128)
    return dict(filter_m=64, filter_n=64, rounds=3, splits=4, verify=1, scan_q=4, scan_n=32)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _splits(q: int, n: int, device: torch.device) -> int:
    """Lists a query, so that the filter's programs fill the chip and a key's position fits its bits."""
    size = blocks()
    filling = PROGRAMS_PER_SM * _multiprocessors(device) // triton.cdiv(q, size["filter_m"])
    useful = min(filling, MAX_SPLITS, triton.cdiv(n, size["filter_n"]))
    return max(useful, size["splits"], triton.cdiv(n, 1 << POSITION_BITS))


def _filtered(
    query: Tensor, keys: Tensor, filled: Tensor | None, result: Tensor, k: int, mean: int, exclude_self: bool
) -> Tensor:
    """Filter and verify: writes the proven results, returns which queries [Q] are not."""
    (q, d), n, size = query.shape, len(keys), blocks()
    splits, listed = _splits(q, n, query.device), max(16, triton.next_power_of_2(k))
    chunk = 64 if d > 32 else 32
    chunks = max(1, triton.cdiv(d, chunk))
    kept = torch.empty(q, splits, listed, dtype=torch.int32, device=query.device)
    unproven = torch.empty(q, dtype=torch.int32, device=query.device)
    strides = (*query.stride(), *keys.stride())
    shared = dict(K=listed, HAS_FILLED=filled is not None, EXCLUDE_SELF=exclude_self)
    filter_kernel[(triton.cdiv(q, size["filter_m"]), splits)](
        query, keys, filled, kept, q, n, splits, d, *strides,
        **shared, FULL=d == chunk * chunks, BM=size["filter_m"], BN=size["filter_n"], BD=chunk, CHUNKS=chunks,
        ROUNDS=size["rounds"], num_warps=8 if d > 128 else 4,
    )  # fmt: skip
    verify_kernel[(triton.cdiv(q, size["verify"]),)](
        query, keys, filled, kept, result, unproven, q, n, splits, k, d, mean, *strides,
        **shared, BQ=size["verify"], BS=triton.next_power_of_2(splits), BK=triton.next_power_of_2(k),
        BD=max(16, triton.next_power_of_2(d)), num_warps=1,
    )  # fmt: skip
    return unproven


def _scan(
    query: Tensor,
    keys: Tensor,
    filled: Tensor | None,
    unproven: Tensor | None,
    result: Tensor,
    k: int,
    mean: int,
    exclude_self: bool,
) -> None:
    """Exact distances to every key, of all queries or the unproven ones."""
    (q, d), n, size = query.shape, len(keys), blocks()
    double = result.dtype == torch.float64
    columns = min(128, max(16, triton.next_power_of_2(d)))
    scan_kernel[(triton.cdiv(q, size["scan_q"]),)](
        query, keys, filled, unproven, result, q, n, k, d, mean, *query.stride(), *keys.stride(),
        HAS_FILLED=filled is not None, EXCLUDE_SELF=exclude_self, MARKED=unproven is not None,
        ACC=tl.float64 if double else tl.float32, BQ=size["scan_q"], BN=size["scan_n"] // (2 if double else 1),
        BK=triton.next_power_of_2(k), BD=columns, CHUNKS=triton.cdiv(d, columns), num_warps=8,
    )  # fmt: skip


def nearest(
    query: Tensor, keys: Tensor, filled: Tensor | None, k: int, reduce: str, exclude_self: bool = False
) -> Tensor:
    """``knn_bonus`` of the first ``filled`` keys, launched at once: no host sync, so it can be captured in a graph.

    Args:
        query: ``[Q, d]``, any strides, read in place.
        keys: ``[N, d]``, the same dtype, any strides.
        filled: how many keys count, int64 ``[]`` on the device; None: all.
        k: neighbours; fewer if there are fewer.
        reduce: "mean" or "kth".
        exclude_self: leave key i out of query i's neighbours. With none left the result is 0.

    Returns:
        ``[Q]``, float32, or float64 for float64.
    """
    (q, d), n = query.shape, len(keys)
    k = min(k, n)
    result = torch.empty(q, dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
    if q == 0:
        return result
    mean = int(reduce == "mean")  # a bool would be a 1-bit argument
    fast = result.dtype == torch.float32 and k <= MAX_K and d <= MAX_D and n <= MAX_SPLITS << POSITION_BITS
    with on(query):
        unproven = _filtered(query, keys, filled, result, k, mean, exclude_self) if fast else None
        _scan(query, keys, filled, unproven, result, k, mean, exclude_self)
    return result


_bonus = Kernel(
    "knn_bonus_triton",
    KnnBonus,
    outputs=1,
    forward=lambda call, _: [nearest(call.query, call.keys, None, call.k, call.reduce).to(call.query.dtype)],
    fake=like_bonus,
)


def knn_bonus(query: Tensor, keys: Tensor, k: int, reduce: str) -> Tensor:
    """Mean, or last, of the k smallest ``‖query - key‖₂``; ``[Q]``. ``apv_fast.ops`` has checked the arguments."""
    return _bonus(query, keys, k, reduce)[0]

"""What this CPU can do at most, measured: products out of caches, copying, reading what stays in L3.

The best of a few runs, of whoever is fastest here, ours or PyTorch. The names are those of ``bench.device``'s ceilings.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from apv_fast.backend import probe
from bench.cost.machine import MB

RUNS = 20
SHAPES = ((400, 2048, 3072), (1024, 1024, 1024))  # rows, inner, columns
FAR, NEAR = 256 * MB, 8 * MB  # beyond any L3, and within ours but beyond L2


def _best(work: Callable[[], object]) -> float:
    """Seconds."""
    work()
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _products() -> list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    if not probe("cpu").available:
        return [torch.mm]
    from apv_fast.cpu.parts.product import product

    return [torch.mm, product]


def _rate(dtype: torch.dtype) -> float:
    """Tera-operations a second of products with sums in float32."""
    best = 0.0
    for rows, inner, columns in SHAPES:
        a, b = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
        seconds = min(_best(functools.partial(multiply, a, b)) for multiply in _products())
        best = max(best, 2 * rows * inner * columns / seconds)
    return best / 1e12


def measure() -> dict[str, float]:
    """Ceilings of all threads together: TFLOP/s, and TB/s read plus written."""
    far, near = torch.zeros(FAR // 4), torch.zeros(NEAR // 4)
    copy = torch.empty_like(far)
    fp32 = _rate(torch.float32)
    rates = {
        "fp32_tflop_s": fp32,
        "tf32_tflop_s": fp32,  # of an op that may use it on a GPU
        "bf16_tflop_s": _rate(torch.bfloat16),
        "copy_tb_s": 2 * FAR / _best(lambda: copy.copy_(far)) / 1e12,
        "l2_read_tb_s": NEAR / _best(near.sum) / 1e12,  # L3 is to a CPU what L2 is to a GPU
    }
    return {name: round(value, 4) for name, value in rates.items()}

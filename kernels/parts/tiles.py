"""What every kernel of the model shares: stores that round, the precision of products, where a launch goes."""
# Kernels are Triton, not Python.
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def"

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import interpreting

INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def only_if(condition, mask):
    """``mask``, and nothing if ``condition`` (one number) is false. Triton 3.9 interprets their ``&`` as integers."""
    return tl.where(condition, mask, False)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """``x`` in ``dtype``, to the nearest; the interpreter would truncate to bfloat16, so there the bits are rounded."""
    if x.dtype == tl.float64 and dtype != tl.float64:
        x = x.to(tl.float32)  # there is no conversion of double to bfloat16
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def store(pointers, x, mask):
    """Store ``x`` where ``mask``, rounded to what the pointers point at."""
    tl.store(pointers, rounded(x, pointers.dtype.scalar.element_ty), mask)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a·b``. The interpreter's own product of bfloat16 is wrong; float32 holds its operands exactly."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


def accumulator(dtype: torch.dtype) -> Any:
    """Triton's type of sums, statistics and states for weights (or states) of ``dtype``."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def precision() -> str:
    """Precision of float32 products: tf32 only where torch itself may use it."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()

"""Products of large float32 matrices in C++, ``csrc/cpu/dense.cpp``; everything else is PyTorch's, which is as fast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apv_fast import _C
from apv_fast.cpu import isa

WORTH_IT = 2**18  # multiplications from which packing, threads and this module's own call pay


def _ours(a: Tensor, b: Tensor) -> bool:
    large = a.shape[0] * a.shape[1] * b.shape[1] >= WORTH_IT and a.shape[0] >= 4 and b.shape[1] >= 4
    return large and a.dtype == b.dtype == torch.float32


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a [M, K] @ b [K, N]`` in the operands' dtype, any strides; no gradients."""
    return _dense(a, b, None, elu=False) if _ours(a, b) else a @ b


def dense(x: Tensor, weight: Tensor, bias: Tensor, *, elu: bool) -> Tensor:
    """``x [M, K] @ weight [N, K]ᵀ + bias [N]``, perhaps ELU of it, in the operands' dtype; no gradients."""
    if _ours(x, weight.T) and bias.is_contiguous():
        return _dense(x, weight.T, bias, elu=elu)
    y = F.linear(x, weight, bias)
    return F.elu(y, inplace=True) if elu else y


def _dense(a: Tensor, b: Tensor, bias: Tensor | None, *, elu: bool) -> Tensor:
    out = a.new_empty(a.shape[0], b.shape[1])
    _C.dense(
        a=a.data_ptr(),
        a_shape=a.shape,
        a_strides=a.stride(),
        b=b.data_ptr(),
        b_shape=b.shape,
        b_strides=b.stride(),
        bias=0 if bias is None else bias.data_ptr(),
        out=out.data_ptr(),
        elu=elu,
        threads=torch.get_num_threads(),
        isa=isa(),
    )
    return out

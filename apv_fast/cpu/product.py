"""Products of large matrices in C++, ``csrc/cpu/dense.cpp``, where they beat PyTorch's (DESIGN.md has the figures).

That is for float32, and for bfloat16 weights with a float32 left operand, which is rounded on the way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apv_fast import _C
from apv_fast.cpu import isa
from apv_fast.cpu.call import address, how, name_of

PARALLEL = 2**18  # multiplications from which a second thread pays


def _ours(a: Tensor, b: Tensor) -> bool:
    # All of float32, however small: MKL's sums depend on the number of threads there.
    rounded = b.dtype == torch.bfloat16 and isa() == "avx512bf16"
    return a.dtype == torch.float32 and (b.dtype == torch.float32 or rounded)


def product(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``a [M, K] @ b [K, N]`` with operands in the dtype of ``b``, any strides; no gradients.

    ``dtype`` of the result: that of ``b`` unless given.
    """
    made = _dense(a, b, None, elu=False) if _ours(a, b) else a.to(b.dtype) @ b
    return made if dtype is None else made.to(dtype)


def dense(x: Tensor, weight: Tensor, bias: Tensor, *, elu: bool) -> Tensor:
    """``x [M, K] @ weight [N, K]ᵀ + bias [N]``, perhaps ELU of it, in the weight's dtype; no gradients."""
    if _ours(x, weight.T) and bias.is_contiguous() and bias.dtype == weight.dtype:
        return _dense(x, weight.T, bias, elu=elu)
    y = F.linear(x.to(weight.dtype), weight, bias)
    return F.elu(y, inplace=True) if elu else y


def elu_backward(grad: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient before ELU ``[M, N]`` from that behind it and ELU's output, and its sum over the rows ``[N]``."""
    if y.dtype not in (torch.float32, torch.bfloat16):
        grad = torch.ops.aten.elu_backward(grad, 1.0, 1.0, 1.0, True, y)
        return grad, grad.sum(0)
    grad, y = grad.contiguous(), y.contiguous()
    made, total = torch.empty_like(y), y.new_empty(y.shape[1])
    _C.elu_backward(
        grad=grad.data_ptr(),
        y=y.data_ptr(),
        out=made.data_ptr(),
        sum=total.data_ptr(),
        m=y.shape[0],
        n=y.shape[1],
        **how(y.dtype),
    )
    return made, total


def _dense(a: Tensor, b: Tensor, bias: Tensor | None, *, elu: bool) -> Tensor:
    out = b.new_empty(a.shape[0], b.shape[1])
    large = a.shape[0] * a.shape[1] * b.shape[1] >= PARALLEL
    _C.dense(
        a=a.data_ptr(),
        a_shape=a.shape,
        a_strides=a.stride(),
        a_dtype=name_of(a.dtype),
        b=b.data_ptr(),
        b_shape=b.shape,
        b_strides=b.stride(),
        b_dtype=name_of(b.dtype),
        bias=address(bias),
        out=out.data_ptr(),
        elu=elu,
        threads=torch.get_num_threads() if large else 1,
        isa=isa(),
    )
    return out

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
from apv_fast.scan.core import Before, Seen

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


def gradient_into(out: Tensor, grad: Tensor, x: Tensor, *, sums: bool) -> Tensor | None:
    """Write ``gradᵀ @ x [N, K]`` into ``out``, contiguous rows, and return the sum ``[N]`` of the rows of ``grad``.

    These are the gradients of a dense layer's weight and bias; in the dtype of ``out``; no gradients.
    """
    x = x.to(out.dtype)
    if _ours(grad, x):
        total = out.new_empty(out.shape[0]) if sums else None
        _dense(grad.T, x, None, elu=False, out=out, row_sums=total)
        return total
    out.copy_(grad.T.to(x.dtype) @ x)
    return grad.sum(0, dtype=out.dtype) if sums else None


def one_hot_gradient_into(out: Tensor, grad: Tensor, before: Before) -> None:
    """Write into ``out [H, S·C]`` the gradient of a weight that saw one-hot latents, from ``grad [B, T, H]``."""
    (batch, length, hidden), (_, groups, classes) = grad.shape, before.start.shape
    grad, stoch, start = grad.contiguous(), before.steps.contiguous(), before.start.to(before.steps).contiguous()
    first = before.is_first.contiguous()
    _C.onehot_gradient(
        grad=grad.data_ptr(),
        stoch=stoch.data_ptr(),
        start=start.data_ptr(),
        first=first.data_ptr(),
        out=out.data_ptr(),
        out_stride=out.stride(0),
        sizes=(batch, length, hidden, groups, classes),
        **how(out.dtype),
    )


def weight_gradient(grad: Tensor, seen: Seen, columns: int) -> tuple[Tensor, Tensor]:
    """See :class:`apv_fast.scan.core.TorchProducts`; what was seen is not put together, and one-hots are looked up."""
    made, begin, total = grad.new_empty(grad.shape[-1], columns), 0, None
    for part in seen:
        width = (part.steps if isinstance(part, Before) else part).shape[-1]
        out = made[:, begin : begin + width]
        begin += width
        if width == 0:  # no product, so no sums
            continue
        if isinstance(part, Before) and part.one_hot:
            one_hot_gradient_into(out, grad, part)
            continue
        if isinstance(part, Before):
            operand = grad.new_empty(part.steps.shape)
            part.write(operand)
        else:
            operand = part
        sums = gradient_into(out, grad.flatten(0, 1), operand.flatten(0, 1), sums=total is None)
        total = sums if total is None else total
    made[:, begin:] = 0
    return made, grad.flatten(0, 1).sum(0) if total is None else total


def _dense(
    a: Tensor, b: Tensor, bias: Tensor | None, *, elu: bool, out: Tensor | None = None, row_sums: Tensor | None = None
) -> Tensor:
    out = b.new_empty(a.shape[0], b.shape[1]) if out is None else out
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
        out_stride=out.stride(0),
        row_sums=address(row_sums),
        elu=elu,
        threads=torch.get_num_threads() if large else 1,
        isa=isa(),
    )
    return out

"""Products of large matrices in C++, ``csrc/cpu/parts/dense.cpp``, where they beat PyTorch's (DESIGN.md, 7).

That is for float32 and float64, and for bfloat16 weights with a float32 left operand, which is rounded on the way. Half
precision is PyTorch's, in pieces where its sums would depend on the number of threads.
"""

from __future__ import annotations

import functools
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from apv_fast import _C
from apv_fast.cpu import isa
from apv_fast.cpu.parts.call import address, how, name_of
from apv_fast.recurrence.phases import Before, Seen

PARALLEL = 2**18  # multiplications from which a second thread pays
PIECES, PIECE = 8, 64  # of a product of PyTorch's: at most, and rows or columns at least


def _operand(a: Tensor, b: Tensor) -> Tensor:
    """``a`` in the dtype in which it is multiplied by ``b``: float32 where our product rounds it on its way."""
    rounded = a.dtype == torch.float32 and b.dtype == torch.bfloat16 and isa() == "avx512bf16"
    return a if rounded else a.to(b.dtype)


def _ours(a: Tensor) -> bool:
    """Whether an :func:`_operand` is multiplied in C++."""
    # However small: MKL's sums depend on the number of threads.
    return a.dtype in (torch.float32, torch.float64)


def _splits_sums() -> bool:
    """Whether PyTorch's product of half precision may deal the terms of a sum out to threads.

    oneDNN does so with AMX, and without AVX-512's instructions for bfloat16; with them it does not.
    """
    restricted = any(name in os.environ for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"))
    return restricted or _C.has_amx() or _C.supported_isas()[0] != "avx512bf16"


def _pytorchs(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """PyTorch's ``a @ b``, perhaps with a bias; the same bits on any number of threads."""
    if not _splits_sums():
        return a @ b if bias is None else F.linear(a, b.T, bias)
    turned = a.shape[0] < b.shape[1]  # the pieces are of the longer side
    left, right = (b.T.detach(), a.T.detach()) if turned else (a.detach(), b.detach())
    result = a.new_empty(left.shape[0], right.shape[1])
    size = max(PIECE, -(-len(left) // PIECES))
    if bias is None:
        bias, beta = result.new_zeros(()), 0
    else:
        bias, beta = bias.detach()[:, None] if turned else bias.detach(), 1
    biases = bias.expand_as(result).split(size)
    parts = [
        functools.partial(torch.addmm, *terms, right, beta=beta, out=out)
        for *terms, out in zip(biases, left.split(size), result.split(size), strict=True)
    ]
    _C.share_out(parts=parts, threads=torch.get_num_threads())
    return result.T.contiguous() if turned else result


def product(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``a [M, K] @ b [K, N]`` with operands in the dtype of ``b``, any strides; no gradients.

    ``dtype`` of the result: that of ``b`` unless given.
    """
    a = _operand(a, b)
    out = _dense(a, b, None, elu=False) if _ours(a) else _pytorchs(a, b)
    return out if dtype is None else out.to(dtype)


def dense(x: Tensor, weight: Tensor, bias: Tensor, *, elu: bool) -> Tensor:
    """``x [M, K] @ weight [N, K]ᵀ + bias [N]``, perhaps ELU of it, in the weight's dtype; no gradients."""
    x = _operand(x, weight)
    if _ours(x):
        return _dense(x, weight.T, bias.to(weight.dtype).contiguous(), elu=elu)
    y = _pytorchs(x, weight.T, bias)
    return F.elu(y, inplace=True) if elu else y


def elu_backward(grad: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient before ELU ``[M, N]`` from that behind it and ELU's output, and its sum over the rows ``[N]``."""
    if y.dtype == torch.float16:
        grad = torch.ops.aten.elu_backward(grad, 1.0, 1.0, 1.0, True, y)
        return grad, grad.sum(0)
    grad, y = grad.contiguous(), y.contiguous()
    grad_in, total = torch.empty_like(y), y.new_empty(y.shape[1])
    _C.elu_backward(
        grad=grad.data_ptr(),
        y=y.data_ptr(),
        out=grad_in.data_ptr(),
        sum=total.data_ptr(),
        m=y.shape[0],
        n=y.shape[1],
        **how(y.dtype),
    )
    return grad_in, total


def gradient_into(out: Tensor, grad: Tensor, x: Tensor, *, sums: bool) -> Tensor | None:
    """Write ``gradᵀ @ x [N, K]`` into ``out``, contiguous rows, and return the sum ``[N]`` of the rows of ``grad``.

    These are the gradients of a dense layer's weight and bias; in the dtype of ``out``; no gradients.
    """
    x = x.to(out.dtype)
    rows = _operand(grad.T, x)
    if _ours(rows):
        total = out.new_empty(out.shape[0]) if sums else None
        _dense(rows, x, None, elu=False, out=out, row_sums=total)
        return total
    out.copy_(_pytorchs(rows, x))
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
    """As :class:`apv_fast.recurrence.phases.TorchProducts` has it, nothing put together, one-hots looked up."""
    grad_weight, begin, total = grad.new_empty(grad.shape[-1], columns), 0, None
    for part in seen:
        width = (part.steps if isinstance(part, Before) else part).shape[-1]
        out = grad_weight[:, begin : begin + width]
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
    grad_weight[:, begin:] = 0
    return grad_weight, grad.flatten(0, 1).sum(0) if total is None else total


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
    )
    return out

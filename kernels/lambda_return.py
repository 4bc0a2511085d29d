r"""The λ-return as one fused Triton launch forward and one backward.

Forward, from the last row to the first, with ``G[H] = v[H] = bootstrap``::

    c[t] = (1 - λ)·v[t+1] + λ·G[t+1]
    G[t] = r[t] + d[t]·c[t]

Backward: the adjoint ``a`` of ``G`` runs the other way, from the cotangent ``g`` of the returns::

    a[t]       = g[t] + λ·d[t-1]·a[t-1]          a[0] = g[0]
    ∂reward    = a[t]
    ∂discount  = a[t]·c[t]                       c from the saved returns, not recomputed
    ∂value     = (1 - λ)·d[t-1]·a[t-1]           row 0 of the values is never used: 0
    ∂bootstrap = d[H-1]·a[H-1]

One thread owns one column: it loads up to 16 rows, then walks them with the carried number in a register, so that a
pass waits for memory once and not once a row. Nothing is read twice. Storage may be float64, float32, bfloat16 or
float16; arithmetic is float64 for float64 and float32 for the others, rounded once on store. The gradient is not
differentiable again.

Floor: forward moves 4·H·N numbers, backward 7·H·N. At 15 x 2500 in float32 that is 0.60 and 1.05 MB, 0.2 and 0.3 µs of
an H100's 3.35 TB/s: the launches are the cost, so there is one a pass. Plain PyTorch launches three a row forward.

Source: Hafner et al., "Mastering Atari with Discrete World Models" (2021), eq. 4.
"""
# Kernels are Triton, not Python: arguments are pointers, and a tuple grows.
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from apv_fast.ops.lambda_return import LambdaReturn, like_rewards
from apv_fast.ops.op import Gradients, Kernel

from .parts.tiles import on

BLOCK = 64  # columns a program: 2500 columns spread over 40 SMs
WARPS = BLOCK // 32  # one column a thread
ROWS = 16  # rows loaded before the first of them is used, so that their latencies overlap


@triton.jit
def _load(base, t, stride_t, column, stride_n, mask, ACC: tl.constexpr):
    """One row of BLOCK numbers at the precision of the arithmetic."""
    return tl.load(base + t * stride_t + column * stride_n, mask).to(ACC)


@triton.jit
def _store(base, t, n, column, number, mask):
    """One row of a contiguous [H, n] output, rounded to its type."""
    tl.store(base + t * n + column, number.to(base.dtype.element_ty), mask)


@triton.jit
def forward_kernel(
    reward, value, discount, bootstrap, returns,  # [H, N], the same, the same, [N], [H, N]
    n,
    reward_t, reward_n, value_t, value_n, discount_t, discount_n, bootstrap_n,  # strides, in elements
    H: tl.constexpr, LAMBDA: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Returns [H, N] (contiguous) of BLOCK columns."""
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    last = tl.full([1], H - 1, tl.int64)  # 64 bits, so that no offset below overflows

    next_value = tl.load(bootstrap + column * bootstrap_n, inside).to(ACC)
    next_return = next_value
    for chunk in range((H + ROWS - 1) // ROWS):
        r, v, d = (), (), ()
        for i in tl.static_range(ROWS):
            t = last - chunk * ROWS - i
            mask = inside & (t >= 0)
            r += (_load(reward, t, reward_t, column, reward_n, mask, ACC),)
            v += (_load(value, t, value_t, column, value_n, mask, ACC),)
            d += (_load(discount, t, discount_t, column, discount_n, mask, ACC),)
        for i in tl.static_range(ROWS):
            t = last - chunk * ROWS - i
            next_return = r[i] + d[i] * ((1 - LAMBDA) * next_value + LAMBDA * next_return)
            next_value = v[i]
            _store(returns, t, n, column, next_return, inside & (t >= 0))


@triton.jit
def backward_kernel(
    grad_returns, value, discount, bootstrap, returns,  # [H, N], the same, the same, [N], [H, N]
    grad_reward, grad_value, grad_discount, grad_bootstrap,  # [H, N], the same, the same, [N]: all contiguous
    n,
    grad_returns_t, grad_returns_n, value_t, value_n, discount_t, discount_n, bootstrap_n,  # strides, in elements
    H: tl.constexpr, LAMBDA: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK columns; ``returns`` is the contiguous output of the forward kernel."""
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    first = tl.full([1], 0, tl.int64)  # 64 bits, so that no offset below overflows

    b = tl.load(bootstrap + column * bootstrap_n, inside).to(ACC)
    through = tl.zeros([BLOCK], ACC)  # d[t-1]·a[t-1]: what reaches v[t] and G[t] from the row before
    for chunk in range((H + ROWS - 1) // ROWS):
        g, d, c = (), (), ()
        for i in tl.static_range(ROWS):
            t = first + chunk * ROWS + i
            mask = inside & (t < H)
            inner = inside & (t < H - 1)  # after the last row, next value and next return are both the bootstrap
            next_value = _load(value, t + 1, value_t, column, value_n, inner, ACC)
            next_return = _load(returns, t + 1, n, column, 1, inner, ACC)
            g += (_load(grad_returns, t, grad_returns_t, column, grad_returns_n, mask, ACC),)
            d += (_load(discount, t, discount_t, column, discount_n, mask, ACC),)
            c += (tl.where(inner, (1 - LAMBDA) * next_value + LAMBDA * next_return, b),)
        for i in tl.static_range(ROWS):
            t = first + chunk * ROWS + i
            mask = inside & (t < H)
            a = g[i] + LAMBDA * through
            _store(grad_reward, t, n, column, a, mask)
            _store(grad_value, t, n, column, (1 - LAMBDA) * through, mask)
            _store(grad_discount, t, n, column, a * c[i], mask)
            through = tl.where(mask, d[i] * a, through)
    tl.store(grad_bootstrap + column, through.to(grad_bootstrap.dtype.element_ty), inside)


def _constants(tensor: Tensor, lambda_: float) -> dict[str, Any]:
    """Compile-time arguments of both kernels; λ and H are settings, so a run compiles each kernel once."""
    acc = tl.float64 if tensor.dtype == torch.float64 else tl.float32
    h = tensor.shape[0]
    return dict(H=h, LAMBDA=lambda_, ACC=acc, BLOCK=BLOCK, ROWS=min(h, ROWS), num_warps=WARPS)


def _forward(call: LambdaReturn, keep: bool) -> list[Tensor]:
    reward, value, discount, bootstrap, lambda_ = call
    horizon, n = reward.shape
    returns = reward.new_empty(horizon, n)
    if returns.numel():
        with on(reward):
            forward_kernel[(triton.cdiv(n, BLOCK),)](
                reward, value, discount, bootstrap, returns, n,
                *reward.stride(), *value.stride(), *discount.stride(), *bootstrap.stride(),
                **_constants(reward, lambda_),
            )  # fmt: skip
    return [returns]


def _backward(
    call: LambdaReturn, results: list[Tensor], grads: list[Tensor | None], needs: frozenset[str]
) -> Gradients:
    (returns,), (grad,) = results, grads
    assert grad is not None
    _, value, discount, bootstrap, lambda_ = call
    horizon, n = grad.shape
    grad_reward, grad_value, grad_discount = (returns.new_empty(horizon, n) for _ in range(3))
    grad_bootstrap = returns.new_empty(n)
    if returns.numel():
        with on(grad):
            backward_kernel[(triton.cdiv(n, BLOCK),)](
                grad, value, discount, bootstrap, returns, grad_reward, grad_value, grad_discount, grad_bootstrap, n,
                *grad.stride(), *value.stride(), *discount.stride(), *bootstrap.stride(),
                **_constants(returns, lambda_),
            )  # fmt: skip
    return {"reward": grad_reward, "value": grad_value, "discount": grad_discount, "bootstrap": grad_bootstrap}


_returns = Kernel(
    "lambda_return_triton", LambdaReturn, outputs=1, forward=_forward, backward=_backward, fake=like_rewards
)


def lambda_return(reward: Tensor, value: Tensor, discount: Tensor, bootstrap: Tensor, lambda_: float) -> Tensor:
    """λ-returns [H, N], differentiable once, of arguments that ``apv_fast.ops.lambda_return`` has checked.

    Args:
        reward, value, discount: [H, N], one floating dtype and one device; any strides, read in place.
        bootstrap: [N], the value after the last row.
        lambda_: the mix of n-step returns, a compile-time constant of the kernel.
    """
    (returns,) = _returns(reward, value, discount, bootstrap, lambda_)
    return returns

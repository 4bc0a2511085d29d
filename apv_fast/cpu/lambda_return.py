"""``lambda_return`` in C++, ``csrc/cpu/returns.cpp``: a vector of sequences at a time, one pass forward, one back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apv_fast import _C
from apv_fast.cpu.parts.call import address, computed, how


def _run(
    inputs: tuple[Tensor | None, ...],
    lambda_: float,
    shape: torch.Size,
    out: Tensor | None,
    grad: Tensor | None,
    gradients: tuple[Tensor, ...],
) -> None:
    dense = [None if x is None else x.contiguous() for x in (*inputs, grad)]
    horizon, n = shape
    _C.lambda_return(
        horizon=horizon,
        n=n,
        lambda_=lambda_,
        inputs=[address(x) for x in dense[:4]],
        out=address(out),
        grad=address(dense[4]),
        gradients=[address(x) for x in gradients] or [0] * 4,
        **how((out if out is not None else gradients[0]).dtype),
    )


@torch.library.custom_op("apv_fast::lambda_return_cpu", mutates_args=())
def _forward(reward: Tensor, value: Tensor, discount: Tensor, bootstrap: Tensor, lambda_: float) -> Tensor:
    returns = reward.new_empty(reward.shape)
    _run((reward, value, discount, bootstrap), lambda_, reward.shape, returns, None, ())
    return returns


@torch.library.custom_op("apv_fast::lambda_return_cpu_backward", mutates_args=())
def _backward(
    grad: Tensor, reward: Tensor, value: Tensor, discount: Tensor, bootstrap: Tensor, lambda_: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = [grad.new_empty(grad.shape) for _ in range(3)]
    gradients = rows[0], rows[1], rows[2], grad.new_empty(grad.shape[1])
    _run((reward, value, discount, bootstrap), lambda_, grad.shape, None, grad, gradients)
    return gradients


@_forward.register_fake
def _(reward: Tensor, value: Tensor, discount: Tensor, bootstrap: Tensor, lambda_: float) -> Tensor:
    return reward.new_empty(reward.shape)


@_backward.register_fake
def _(
    grad: Tensor, reward: Tensor, value: Tensor, discount: Tensor, bootstrap: Tensor, lambda_: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = [grad.new_empty(grad.shape) for _ in range(3)]
    return rows[0], rows[1], rows[2], grad.new_empty(grad.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.lambda_ = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, ctx.lambda_), None


_forward.register_autograd(_differentiate, setup_context=_save)


def lambda_return(reward: Tensor, value: Tensor, discount: Tensor, bootstrap: Tensor, lambda_: float) -> Tensor:
    """λ-returns [H, N], differentiable once, of arguments that ``apv_fast.ops.lambda_return`` has checked."""
    returns: Tensor = _forward(*(computed(x) for x in (reward, value, discount, bootstrap)), lambda_)
    return returns.to(reward.dtype)

"""``lambda_return`` in C++, ``csrc/cpu/lambda_return/``: a vector of sequences at a time, a pass each way."""

from __future__ import annotations

import torch
from torch import Tensor

from apv_fast import _C
from apv_fast.cpu.parts.call import address, computed, how
from apv_fast.ops.lambda_return import LambdaReturn, like_rewards
from apv_fast.ops.op import Gradients, Kernel


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


def _forward(call: LambdaReturn, keep: bool) -> list[Tensor]:
    returns = call.reward.new_empty(call.reward.shape)
    _run(call[:4], call.lambda_, call.reward.shape, returns, None, ())
    return [returns]


def _backward(
    call: LambdaReturn, results: list[Tensor], grads: list[Tensor | None], needs: frozenset[str]
) -> Gradients:
    (grad,) = grads
    assert grad is not None
    reward, value, discount = (grad.new_empty(grad.shape) for _ in range(3))
    bootstrap = grad.new_empty(grad.shape[1])
    _run(call[:4], call.lambda_, grad.shape, None, grad, (reward, value, discount, bootstrap))
    return {"reward": reward, "value": value, "discount": discount, "bootstrap": bootstrap}


_returns = Kernel("lambda_return_cpu", LambdaReturn, outputs=1, forward=_forward, backward=_backward, fake=like_rewards)


def lambda_return(reward: Tensor, value: Tensor, discount: Tensor, bootstrap: Tensor, lambda_: float) -> Tensor:
    """λ-returns [H, N], differentiable once, of arguments that ``apv_fast.ops.lambda_return`` has checked."""
    (returns,) = _returns(*(computed(x) for x in (reward, value, discount, bootstrap)), lambda_)
    return returns.to(reward.dtype)

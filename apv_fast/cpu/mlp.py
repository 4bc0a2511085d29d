"""``mlp`` with products, bias and ELU in C++ where that is faster: see :mod:`apv_fast.cpu.parts.product`.

A bfloat16 network takes a float32 input: the first layer rounds it on the way, and its gradient comes as float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apv_fast.cpu.parts.product import dense, elu_backward, product


@torch.library.custom_op("apv_fast::mlp_cpu", mutates_args=(), schema="(Tensor x, Tensor[] layers) -> Tensor[]")
def _forward(x: Tensor, layers: list[Tensor]) -> list[Tensor]:
    """Every layer's output."""
    made = []
    for weight, bias in zip(layers[::2], layers[1::2], strict=True):
        x = dense(x, weight, bias, elu=True)
        made.append(x)
    return made


@torch.library.custom_op(
    "apv_fast::mlp_cpu_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor[] layers, Tensor[] made, bool of_x, bool of_layers) -> Tensor[]",
)
def _backward(
    grad: Tensor, x: Tensor, layers: list[Tensor], made: list[Tensor], of_x: bool, of_layers: bool
) -> list[Tensor]:
    """Gradients of x, then of the layers; empty where they are not wanted."""
    before, grads = [x, *made[:-1]], [x.new_empty(0) for _ in layers]
    for i in reversed(range(len(made))):
        grad, total = elu_backward(grad, made[i])
        if of_layers:
            grads[2 * i : 2 * i + 2] = [product(grad.T, before[i].to(grad.dtype)), total]
        if i > 0 or of_x:
            grad = product(grad, layers[2 * i], before[i].dtype)
    return [grad if of_x else x.new_empty(0), *grads]


@_forward.register_fake
def _(x: Tensor, layers: Sequence[Tensor]) -> list[Tensor]:
    return [bias.new_empty(x.shape[0], bias.shape[0]) for bias in layers[1::2]]


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, layers: Sequence[Tensor], made: Sequence[Tensor], of_x: bool, of_layers: bool
) -> list[Tensor]:
    return [
        x.new_empty(x.shape if of_x else 0),
        *(weight.new_empty(weight.shape if of_layers else 0) for weight in layers),
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, layers = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[:-1])
    ctx.layers = len(layers)
    ctx.save_for_backward(x, *layers, *output)


def _differentiate(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    of_x, of_layers = ctx.needs_input_grad
    wanted = any(of_layers)
    last = grads[-1]
    if last is None:
        return None, [None] * ctx.layers
    dx, *made = _backward(last, x, rest[: ctx.layers], rest[ctx.layers :], of_x, wanted)
    return dx if of_x else None, made if wanted else [None] * ctx.layers


_forward.register_autograd(_differentiate, setup_context=_save)


def mlp(x: Tensor, layers: list[Tensor]) -> Tensor:
    """See :func:`apv_fast.reference.mlp.mlp`."""
    return _forward(x, layers)[-1]

"""``image_loss`` and ``normalize_image`` in C++, ``csrc/cpu/image.cpp``: one pass over the bytes each.

The loss leaves its gradient too, for a cotangent of 1, which is what a term of a sum of losses gets: the mean is read
once, and the backward has nothing to do. For another cotangent the gradient is computed again, so that it is rounded
once. Numbers are taken in the order of the mean's memory, whatever its strides.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from apv_fast import _C
from apv_fast.cpu.parts.call import address, computed, how
from apv_fast.types import state_dtype


def _in_order(x: Tensor, order: Tensor) -> Tensor:
    """``x`` with the strides of ``order``, which has no gaps."""
    if x.stride() == order.stride():
        return x
    return torch.empty_strided(x.shape, order.stride(), dtype=x.dtype).copy_(x)


def _run(mean: Tensor, image: Tensor, loss: Tensor | None, gradient: Tensor | None, cotangent: float) -> None:
    """Leaves the loss, and the gradient of ``cotangent`` times it."""
    order = torch.empty_like(mean, device="meta")
    mean, image = _in_order(mean, order), _in_order(image, order)
    images = math.prod(mean.shape[:-3])
    _C.image(
        of_loss=True,
        count=mean.numel(),
        images=images,
        scale=cotangent / images if images else 0.0,
        constant=0.5 * math.log(2 * math.pi) * math.prod(mean.shape[-3:]),
        image=address(image),
        mean=address(mean),
        loss=address(loss),
        out=address(gradient),
        **how(mean.dtype),
    )


@torch.library.custom_op("apv_fast::image_loss_cpu", mutates_args=())
def _forward(mean: Tensor, image: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """The loss and its gradient, which is empty if not wanted."""
    loss = mean.new_empty((), dtype=state_dtype(mean.dtype))
    gradient = torch.empty_like(mean) if with_gradient else mean.new_empty(0)
    _run(mean, image, loss, gradient if with_gradient else None, 1.0)
    return loss, gradient


@torch.library.custom_op("apv_fast::image_loss_cpu_backward", mutates_args=())
def _backward(grad: Tensor, mean: Tensor, image: Tensor) -> Tensor:
    gradient = torch.empty_like(mean)
    _run(mean, image, None, gradient, grad.item())
    return gradient


@torch.library.custom_op("apv_fast::normalize_image_cpu", mutates_args=())
def _normalize(image: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(image.shape, dtype=dtype)
    image = image.contiguous()
    _C.image(
        of_loss=False,
        count=image.numel(),
        images=0,
        scale=0.0,
        constant=0.0,
        image=address(image),
        mean=0,
        loss=0,
        out=address(out),
        **how(dtype),
    )
    return out


@_forward.register_fake
def _(mean: Tensor, image: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    gradient = torch.empty_like(mean) if with_gradient else mean.new_empty(0)
    return mean.new_empty((), dtype=state_dtype(mean.dtype)), gradient


@_backward.register_fake
def _(grad: Tensor, mean: Tensor, image: Tensor) -> Tensor:
    return torch.empty_like(mean)


@_normalize.register_fake
def _(image: Tensor, dtype: torch.dtype) -> Tensor:
    return image.new_empty(image.shape, dtype=dtype)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: tuple[Tensor, Tensor]) -> None:
    mean, image, ctx.with_gradient = inputs
    ctx.save_for_backward(mean, image, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None, None]:
    mean, image, gradient = ctx.saved_tensors
    if grad is None:
        return None, None, None
    # A subclass (of a tracer) has no number to look at.
    if ctx.with_gradient and type(grad) is Tensor and grad.item() == 1:
        return gradient, None, None
    return _backward(grad, mean, image), None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def image_loss(mean: Tensor, image: Tensor) -> Tensor:
    """The loss, a scalar that is differentiable once, of arguments that ``apv_fast.ops.image_loss`` has checked."""
    loss, _ = _forward(computed(mean), image, torch.is_grad_enabled() and mean.requires_grad)
    return loss


def normalize_image(image: Tensor, dtype: torch.dtype) -> Tensor:
    """u/255 - ½ in ``dtype``, contiguous ``[..., H, W, C]``."""
    return _normalize(image, state_dtype(dtype)).to(dtype) if dtype == torch.float16 else _normalize(image, dtype)

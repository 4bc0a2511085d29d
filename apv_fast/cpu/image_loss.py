"""``image_loss`` and ``normalize_image`` in C++, ``csrc/cpu/image_loss/``: one pass over the bytes each.

The loss leaves its gradient too, for a cotangent of 1, which is what a term of a sum of losses gets: the mean is read
once, and the backward has nothing to do. For another cotangent the gradient is computed again, so that it is rounded
once. Numbers are taken in the order of the mean's memory, whatever its strides.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from apv_fast import _C
from apv_fast.cpu.parts.call import address, computed, how
from apv_fast.ops.image_loss import ImageLoss, NormalizeImage, like_normalized
from apv_fast.ops.op import Gradients, Kernel
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


def _forward(call: ImageLoss, keep: bool) -> list[Tensor]:
    """The loss and, with ``keep``, its gradient."""
    loss, *gradient = _like(call, keep)
    _run(*call, loss, gradient[0] if keep else None, 1.0)
    return [loss, *gradient]


def _like(call: ImageLoss, keep: bool) -> list[Tensor]:
    loss = call.mean.new_empty((), dtype=state_dtype(call.mean.dtype))
    return [loss, torch.empty_like(call.mean)] if keep else [loss]


def _backward(call: ImageLoss, results: list[Tensor], grads: list[Tensor | None], needs: frozenset[str]) -> Gradients:
    (grad,) = grads
    assert grad is not None
    gradient = torch.empty_like(call.mean)
    _run(*call, None, gradient, grad.item())
    return {"mean": gradient}


def _ready(results: list[Tensor], grads: list[Tensor | None]) -> Gradients | None:
    (grad,) = grads
    # A subclass (of a tracer) has no number to look at.
    return {"mean": results[1]} if type(grad) is Tensor and grad.item() == 1 else None


def _normalize(call: NormalizeImage, keep: bool) -> list[Tensor]:
    out = torch.empty(call.image.shape, dtype=call.dtype)
    image = call.image.contiguous()
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
        **how(call.dtype),
    )
    return [out]


_loss = Kernel(
    "image_loss_cpu",
    ImageLoss,
    outputs=1,
    forward=_forward,
    backward=_backward,
    fake=_like,
    ready=_ready,
    like=torch.empty_like,
)
_normalized = Kernel("normalize_image_cpu", NormalizeImage, outputs=1, forward=_normalize, fake=like_normalized)


def image_loss(mean: Tensor, image: Tensor) -> Tensor:
    """The loss, a scalar that is differentiable once, of arguments that ``apv_fast.ops.image_loss`` has checked."""
    return _loss(computed(mean), image)[0]


def normalize_image(image: Tensor, dtype: torch.dtype) -> Tensor:
    """u/255 - ½ in ``dtype``, contiguous ``[..., H, W, C]``."""
    out = _normalized(image, state_dtype(dtype) if dtype == torch.float16 else dtype)[0]
    return out.to(dtype)

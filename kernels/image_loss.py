r"""Images: the Gaussian reconstruction loss with its gradient, and what the encoder sees, each in one pass over uint8.

Loss of N images x of M = H·W·C bytes u, with ``x = u/255 - ½``, and its gradient for the cotangent g::

    L = (½ Σ (x - mean)² ) / N + ½·M·log 2π         ∂L/∂mean = g·(mean - x)/N

The forward writes one partial sum a program; a second launch of one program adds them in a fixed order, without
atomics, so every run has the same bits. The backward recomputes ``mean - x``: a gradient written in the forward would
have to be read and written once more to be multiplied by g, which only the device knows. In bytes an image number, with
b bytes a number of the mean: 3·b + 2 for both passes; with the gradient in the forward 4·b + 1, rounded twice.

The mean is read, and its gradient written, through four strides, so an image that the decoder's convolution has left
channels-first in memory is not copied; memory without gaps in the order of the images takes the flat path of 16-byte
accesses. The mean may be float64, float32, bfloat16 or float16; arithmetic is float64 for float64 and float32 for the
others. The gradient is not differentiable again.

Floor, 2500 images of 64 x 64 x 3 (30.7 M numbers), at an H100's 3.35 TB/s: forward 92 MB = 28 µs and backward 154 MB =
46 µs in bfloat16; 154 MB = 46 µs and 276 MB = 83 µs in float32. ``normalize``: 92 MB = 28 µs to bfloat16, 154 MB =
46 µs to float32; in plain PyTorch, which makes a float32 tensor a step, 829 MB and 645 MB.

Source: Hafner et al., "Learning Latent Dynamics for Planning from Pixels" (2019), eq. 3.
"""
# Kernels are Triton, not Python: arguments are pointers.
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from apv_fast.ops.image_loss import ImageLoss, NormalizeImage, like_normalized
from apv_fast.ops.op import Gradients, Kernel

from .parts.pointwise import divide
from .parts.tiles import on

BLOCK = 2048  # numbers a program holds at a time: 16 a thread, so 16 bytes of each image and 16 or more of the mean
STEPS = 8  # blocks a program takes one after the other: 1875 programs for 2500 images of 64 x 64 x 3
FINISH = 1024  # partial sums that the finishing program adds at a time


@triton.jit
def _pixel(image, offset, inside, ACC: tl.constexpr):
    """What the model sees of a byte: u/255 - ½ = (2u - 255)/510, with 1/510 in two parts, so no division is needed.

    The error is at most 2^-25, that of dividing and subtracting as PyTorch does.
    """
    odd = 2.0 * tl.load(image + offset, inside, 0).to(ACC) - 255.0
    return odd * 0.0019607844296842813 + odd * -1.1595879118031505e-10


@triton.jit
def _offset(
    i, stride_n, stride_h, stride_w, stride_c, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, FLAT: tl.constexpr
):  # fmt: skip
    """Where the i-th number of [N, H, W, C] lies, in elements."""
    if FLAT:
        return i
    else:  # not left out: what follows a return is compiled too
        n, h, w, c = i // (H * W * C), i // (W * C) % H, i // C % W, i % C
        return n * stride_n + h * stride_h + w * stride_w + c * stride_c


@triton.jit
def forward_kernel(
    mean, image, partial,  # [N, H, W, C] twice, [programs]
    count,  # N·H·W·C
    mean_n, mean_h, mean_w, mean_c, image_n, image_h, image_w, image_c,  # strides, in elements
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, MEAN_FLAT: tl.constexpr, IMAGE_FLAT: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Σ (x - mean)² over STEPS·BLOCK numbers."""
    total = tl.zeros([BLOCK], ACC)
    for step in range(STEPS):
        i = (tl.program_id(0).to(tl.int64) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        inside = i < count
        x = _pixel(image, _offset(i, image_n, image_h, image_w, image_c, H, W, C, IMAGE_FLAT), inside, ACC)
        of_mean = _offset(i, mean_n, mean_h, mean_w, mean_c, H, W, C, MEAN_FLAT)
        difference = x - tl.load(mean + of_mean, inside, 0.0).to(ACC)
        total += tl.where(inside, difference * difference, 0.0)
    tl.store(partial + tl.program_id(0), tl.sum(total, 0))


@triton.jit(do_not_specialize=["programs", "images"])  # 1 would become a Python number
def finish_kernel(
    partial, loss,  # [programs], []
    programs, images,  # images: N
    CONSTANT: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the loss, in an order that only the number of partial sums decides."""
    total = tl.zeros([BLOCK], tl.float64)
    start = programs * 0
    while start < programs:
        i = start + tl.arange(0, BLOCK)
        total += tl.load(partial + i, i < programs, 0.0).to(tl.float64)
        start += BLOCK
    tl.store(loss, (0.5 * tl.sum(total, 0) / images.to(tl.float64) + CONSTANT).to(ACC))


@triton.jit(do_not_specialize=["images"])
def backward_kernel(
    grad, mean, image, grad_mean,  # [], [N, H, W, C] three times
    count, images,  # N·H·W·C, N
    mean_n, mean_h, mean_w, mean_c, image_n, image_h, image_w, image_c, grad_n, grad_h, grad_w, grad_c,  # strides
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, MEAN_FLAT: tl.constexpr, IMAGE_FLAT: tl.constexpr,
    GRAD_FLAT: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK numbers of the mean."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    scale = divide(tl.load(grad).to(ACC), images.to(ACC))
    x = _pixel(image, _offset(i, image_n, image_h, image_w, image_c, H, W, C, IMAGE_FLAT), inside, ACC)
    of_mean = _offset(i, mean_n, mean_h, mean_w, mean_c, H, W, C, MEAN_FLAT)
    difference = tl.load(mean + of_mean, inside, 0.0).to(ACC) - x
    of_grad = _offset(i, grad_n, grad_h, grad_w, grad_c, H, W, C, GRAD_FLAT)
    tl.store(grad_mean + of_grad, (scale * difference).to(grad_mean.dtype.element_ty), inside)


@triton.jit
def normalize_kernel(
    image, out,  # [N, H, W, C], the same without gaps
    count,  # N·H·W·C
    image_n, image_h, image_w, image_c,  # strides, in elements
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, IMAGE_FLAT: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """u/255 - ½ of BLOCK numbers."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    x = _pixel(image, _offset(i, image_n, image_h, image_w, image_c, H, W, C, IMAGE_FLAT), inside, ACC)
    tl.store(out + i, x.to(out.dtype.element_ty), inside)


def _acc(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _constants(image: Tensor, acc: torch.dtype) -> dict[str, Any]:
    """Compile-time arguments that all kernels take."""
    _, h, w, c = image.shape
    kind = tl.float64 if acc == torch.float64 else tl.float32
    return dict(H=h, W=w, C=c, IMAGE_FLAT=image.is_contiguous(), ACC=kind, BLOCK=BLOCK)


def _forward(call: ImageLoss, keep: bool) -> list[Tensor]:
    mean, image = call
    acc, count = _acc(mean), mean.numel()
    programs = triton.cdiv(count, BLOCK * STEPS)
    partial = mean.new_empty(programs, dtype=acc)
    loss = partial.new_empty(())
    constants = _constants(image, acc)
    with on(mean):
        if programs:
            forward_kernel[(programs,)](
                mean, image, partial, count, *mean.stride(), *image.stride(),
                MEAN_FLAT=mean.is_contiguous(), STEPS=STEPS, **constants,
            )  # fmt: skip
        constant = 0.5 * math.log(2 * math.pi) * math.prod(mean.shape[1:])
        finish_kernel[(1,)](partial, loss, programs, len(mean), CONSTANT=constant, ACC=constants["ACC"], BLOCK=FINISH)
    return [loss]


def _backward(call: ImageLoss, results: list[Tensor], grads: list[Tensor | None], needs: frozenset[str]) -> Gradients:
    (grad,), (mean, image) = grads, call
    gradient = torch.empty_like(mean)  # strides and all, if the mean's memory has neither gaps nor overlaps
    if count := mean.numel():
        with on(mean):
            backward_kernel[(triton.cdiv(count, BLOCK),)](
                grad, mean, image, gradient, count, len(mean), *mean.stride(), *image.stride(), *gradient.stride(),
                MEAN_FLAT=mean.is_contiguous(), GRAD_FLAT=gradient.is_contiguous(), **_constants(image, _acc(mean)),
            )  # fmt: skip
    return {"mean": gradient}


def _normalize(call: NormalizeImage, keep: bool) -> list[Tensor]:
    image, out = call.image, call.image.new_empty(call.image.shape, dtype=call.dtype)
    if count := image.numel():
        with on(image):
            normalize_kernel[(triton.cdiv(count, BLOCK),)](
                image, out, count, *image.stride(), **_constants(image, _acc(out))
            )
    return [out]


_loss = Kernel(
    "image_loss_triton",
    ImageLoss,
    outputs=1,
    forward=_forward,
    backward=_backward,
    fake=lambda call, _: [call.mean.new_empty((), dtype=_acc(call.mean))],
    like=torch.empty_like,
)
_normalized = Kernel("normalize_image_triton", NormalizeImage, outputs=1, forward=_normalize, fake=like_normalized)


def _flatten(tensor: Tensor) -> Tensor:
    """[..., H, W, C] as [N, H, W, C]: a view, unless the leading dimensions do not follow each other in memory."""
    return tensor.reshape(math.prod(tensor.shape[:-3]), *tensor.shape[-3:])


def image_loss(mean: Tensor, image: Tensor) -> Tensor:
    """The loss, a scalar that is differentiable once, of arguments that ``apv_fast.ops.image_loss`` has checked.

    Args:
        mean: [..., H, W, C], floating; any strides, read in place.
        image: the same shape, uint8.
    """
    return _loss(_flatten(mean), _flatten(image))[0]


def normalize_image(image: Tensor, dtype: torch.dtype) -> Tensor:
    """u/255 - ½ in ``dtype``, contiguous [..., H, W, C]: permuted, what a convolution calls channels-last."""
    return _normalized(_flatten(image), dtype)[0].reshape(image.shape)

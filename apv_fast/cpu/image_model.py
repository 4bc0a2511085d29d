"""``image_encoder`` and ``image_decoder`` in C++: ``csrc/cpu/image_model.h``, one call a pass over all layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apv_fast import _C
from apv_fast.cpu.parts.call import how
from apv_fast.types import state_dtype

ENCODER_SIDES = (31, 14, 6, 2)
DECODER_SIDES = (5, 13, 30, 64)


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [x.data_ptr() for x in tensors]


# ---- encoder: images [N, 64, 64, C], uint8 or dtype; layers contiguous, in state_dtype(dtype)


def _encoder_outputs(image: Tensor, layers: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    shapes = [(len(image), side, side, len(bias)) for side, bias in zip(ENCODER_SIDES, layers[1::2], strict=True)]
    dtypes = [dtype] * 3 + [state_dtype(dtype)]
    return [image.new_empty(shape, dtype=of) for shape, of in zip(shapes, dtypes, strict=True)]


@torch.library.custom_op(
    "apv_fast::image_encoder_cpu",
    mutates_args=(),
    schema="(Tensor image, Tensor[] layers, ScalarType dtype, bool keep) -> Tensor[]",
)
def _encode(image: Tensor, layers: list[Tensor], dtype: torch.dtype, keep: bool) -> list[Tensor]:
    """Outputs of all layers; of the last only, and three that are empty, unless ``keep``."""
    outputs = _encoder_outputs(image, layers, dtype)
    if len(image) > 0:
        _C.encoder_pass(
            shape=(len(image), image.shape[-1], len(layers[1])),
            image=image.data_ptr(),
            bytes=image.dtype == torch.uint8,
            parameters=_addresses(layers),
            outputs=_addresses(outputs),
            **how(dtype),
        )
    return outputs if keep else [*(x.new_empty(0) for x in outputs[:-1]), outputs[-1]]


@_encode.register_fake
def _(image: Tensor, layers: Sequence[Tensor], dtype: torch.dtype, keep: bool) -> list[Tensor]:
    outputs = _encoder_outputs(image, layers, dtype)
    return outputs if keep else [*(x.new_empty(0) for x in outputs[:-1]), outputs[-1]]


@torch.library.custom_op(
    "apv_fast::image_encoder_cpu_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor image, Tensor[] layers, Tensor[] outputs, ScalarType dtype, bool of_image) "
    "-> Tensor[]",
)
def _encode_backward(
    grad: Tensor, image: Tensor, layers: list[Tensor], outputs: list[Tensor], dtype: torch.dtype, of_image: bool
) -> list[Tensor]:
    """Gradients of the images (empty if not wanted), then of the layers."""
    image_grad = image.new_empty(image.shape if of_image else 0)
    if len(image) == 0:
        return [image_grad, *(torch.zeros_like(x) for x in layers)]
    grad, grads = grad.contiguous(), [torch.empty_like(x) for x in layers]
    _C.encoder_pass(
        shape=(len(image), image.shape[-1], len(layers[1])),
        image=image.data_ptr(),
        bytes=image.dtype == torch.uint8,
        parameters=_addresses(layers),
        outputs=_addresses(outputs),
        grad=grad.data_ptr(),
        gradients=_addresses(grads),
        image_grad=image_grad.data_ptr() if of_image else 0,
        **how(dtype),
    )
    return [image_grad, *grads]


@_encode_backward.register_fake
def _(
    grad: Tensor,
    image: Tensor,
    layers: Sequence[Tensor],
    outputs: Sequence[Tensor],
    dtype: torch.dtype,
    of_image: bool,
) -> list[Tensor]:
    return [image.new_empty(image.shape if of_image else 0), *(torch.empty_like(x) for x in layers)]


# ---- decoder: features [N, F] in dtype; layers as above


def _decoder_outputs(feat: Tensor, layers: Sequence[Tensor]) -> list[Tensor]:
    shapes = [(side, side, len(bias)) for side, bias in zip(DECODER_SIDES, layers[3::2], strict=True)]
    return [feat.new_empty(len(feat), len(layers[1])), *(feat.new_empty(len(feat), *shape) for shape in shapes)]


@torch.library.custom_op(
    "apv_fast::image_decoder_cpu", mutates_args=(), schema="(Tensor feat, Tensor[] layers, bool keep) -> Tensor[]"
)
def _decode(feat: Tensor, layers: list[Tensor], keep: bool) -> list[Tensor]:
    """Outputs of all layers; of the last only, and four that are empty, unless ``keep``."""
    outputs = _decoder_outputs(feat, layers)
    if len(feat) > 0:
        _C.decoder_pass(
            shape=(*feat.shape, len(layers[-1]), len(layers[1]) // 32),
            feat=feat.data_ptr(),
            parameters=_addresses(layers),
            outputs=_addresses(outputs),
            **how(feat.dtype),
        )
    return outputs if keep else [*(x.new_empty(0) for x in outputs[:-1]), outputs[-1]]


@_decode.register_fake
def _(feat: Tensor, layers: Sequence[Tensor], keep: bool) -> list[Tensor]:
    outputs = _decoder_outputs(feat, layers)
    return outputs if keep else [*(x.new_empty(0) for x in outputs[:-1]), outputs[-1]]


@torch.library.custom_op(
    "apv_fast::image_decoder_cpu_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor feat, Tensor[] layers, Tensor[] outputs) -> Tensor[]",
)
def _decode_backward(grad: Tensor, feat: Tensor, layers: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
    """Gradients of the features and of the layers."""
    if len(feat) == 0:
        return [feat.new_empty(feat.shape, dtype=layers[0].dtype), *(torch.zeros_like(x) for x in layers)]
    feat_grad = feat.new_empty(feat.shape, dtype=layers[0].dtype)
    grad, grads = grad.contiguous(), [torch.empty_like(x) for x in layers]
    _C.decoder_pass(
        shape=(*feat.shape, len(layers[-1]), len(layers[1]) // 32),
        feat=feat.data_ptr(),
        parameters=_addresses(layers),
        outputs=_addresses(outputs),
        grad=grad.data_ptr(),
        gradients=_addresses(grads),
        feat_grad=feat_grad.data_ptr(),
        **how(feat.dtype),
    )
    return [feat_grad, *grads]


@_decode_backward.register_fake
def _(grad: Tensor, feat: Tensor, layers: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
    return [feat.new_empty(feat.shape, dtype=layers[0].dtype), *(torch.empty_like(x) for x in layers)]


# ---- autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, layers, *rest = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[:-1])
    ctx.layers, ctx.arguments = len(layers), rest
    ctx.save_for_backward(x, *layers, *output)


def _saved(ctx: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    x, *rest = ctx.saved_tensors
    return x, rest[: ctx.layers], rest[ctx.layers :]


def _differentiate_encoder(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    of_image, of_layers = ctx.needs_input_grad[:2]
    if grads[-1] is None:
        return None, [None] * ctx.layers, None, None
    dtype = ctx.arguments[0]
    image_grad, *made = _encode_backward(grads[-1], *_saved(ctx), dtype, of_image)
    return image_grad if of_image else None, _wanted(made, of_layers), None, None


def _differentiate_decoder(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    of_feat, of_layers = ctx.needs_input_grad[:2]
    if grads[-1] is None:
        return None, [None] * ctx.layers, None
    x, layers, outputs = _saved(ctx)
    feat_grad, *made = _decode_backward(grads[-1], x, layers, outputs)
    return feat_grad.to(x.dtype) if of_feat else None, _wanted(made, of_layers), None


def _wanted(grads: list[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    return [grad if want else None for grad, want in zip(grads, wanted, strict=True)]


_encode.register_autograd(_differentiate_encoder, setup_context=_save)
_decode.register_autograd(_differentiate_decoder, setup_context=_save)


# ---- what the table names


def _prepared(layers: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.to(state_dtype(dtype)).contiguous() for x in layers]


def _differentiable(x: Tensor, layers: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in (x, *layers))


def image_encoder(image: Tensor, layers: list[Tensor], dtype: torch.dtype) -> Tensor:
    """See :func:`apv_fast.reference.image_model.image_encoder`."""
    keep = _differentiable(image, layers)
    leading = image.shape[:-3]
    x = image.reshape(leading.numel(), *image.shape[-3:]).contiguous()
    x = x if image.dtype == torch.uint8 else x.to(dtype)
    embed = _encode(x, _prepared(layers, dtype), dtype, keep)[-1]
    return embed.reshape(*leading, 4 * embed.shape[-1])  # of 2×2 pixels


def image_decoder(feat: Tensor, layers: list[Tensor], dtype: torch.dtype) -> Tensor:
    """See :func:`apv_fast.reference.image_model.image_decoder`."""
    keep = _differentiable(feat, layers)
    leading = feat.shape[:-1]
    x = feat.reshape(leading.numel(), feat.shape[-1]).to(dtype).contiguous()
    mean = _decode(x, _prepared(layers, dtype), keep)[-1]
    return mean.reshape(*leading, *mean.shape[1:])


def obstacle(tensor: Tensor, **_: int) -> str:
    """Why convolutions in the dtype of ``tensor`` cannot run here; empty if they can."""
    return "its convolutions do not take torch.float16" if tensor.dtype == torch.float16 else ""

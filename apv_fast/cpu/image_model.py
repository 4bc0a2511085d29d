"""``image_encoder`` and ``image_decoder`` in C++: ``csrc/cpu/image_model/``, one call a pass over all layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from apv_fast import _C
from apv_fast.cpu.parts.call import how
from apv_fast.ops.image_model import ImageDecoder, ImageEncoder
from apv_fast.ops.op import Gradients, Kernel
from apv_fast.types import state_dtype

ENCODER_SIDES = (31, 14, 6, 2)
DECODER_SIDES = (5, 13, 30, 64)


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [x.data_ptr() for x in tensors]


def _last_first(outputs: list[Tensor], keep: bool) -> list[Tensor]:
    """What a caller sees, then what the backward pass needs besides."""
    return outputs[::-1] if keep else outputs[-1:]


# ---- encoder: images [N, 64, 64, C], uint8 or dtype; layers contiguous, in state_dtype(dtype)


def _encoder_outputs(call: ImageEncoder) -> list[Tensor]:
    image, biases = call.image, call.layers[1::2]
    shapes = [(len(image), side, side, len(bias)) for side, bias in zip(ENCODER_SIDES, biases, strict=True)]
    dtypes = [call.dtype] * 3 + [state_dtype(call.dtype)]
    return [image.new_empty(shape, dtype=of) for shape, of in zip(shapes, dtypes, strict=True)]


def _encode(call: ImageEncoder, keep: bool) -> list[Tensor]:
    image, layers = call.image, call.layers
    outputs = _encoder_outputs(call)
    if len(image) > 0:
        _C.encoder_pass(
            shape=(len(image), image.shape[-1], len(layers[1])),
            image=image.data_ptr(),
            bytes=image.dtype == torch.uint8,
            parameters=_addresses(layers),
            outputs=_addresses(outputs),
            **how(call.dtype),
        )
    return _last_first(outputs, keep)


def _encode_backward(
    call: ImageEncoder, results: list[Tensor], grads: list[Tensor | None], needs: frozenset[str]
) -> Gradients:
    image, layers, grad = call.image, call.layers, grads[0]
    of_image = image.new_empty(image.shape if "image" in needs else 0)
    if len(image) == 0 or grad is None:
        return {"image": of_image.zero_(), "layers": [torch.zeros_like(x) for x in layers]}
    grad, of_layers = grad.contiguous(), [torch.empty_like(x) for x in layers]
    _C.encoder_pass(
        shape=(len(image), image.shape[-1], len(layers[1])),
        image=image.data_ptr(),
        bytes=image.dtype == torch.uint8,
        parameters=_addresses(layers),
        outputs=_addresses(results[::-1]),
        grad=grad.data_ptr(),
        gradients=_addresses(of_layers),
        image_grad=of_image.data_ptr() if "image" in needs else 0,
        **how(call.dtype),
    )
    return {"image": of_image, "layers": of_layers}


# ---- decoder: features [N, F] in dtype; layers as above


def _decoder_outputs(call: ImageDecoder) -> list[Tensor]:
    feat, layers = call.feat, call.layers
    shapes = [(side, side, len(bias)) for side, bias in zip(DECODER_SIDES, layers[3::2], strict=True)]
    return [feat.new_empty(len(feat), len(layers[1])), *(feat.new_empty(len(feat), *shape) for shape in shapes)]


def _decode(call: ImageDecoder, keep: bool) -> list[Tensor]:
    feat, layers = call.feat, call.layers
    outputs = _decoder_outputs(call)
    if len(feat) > 0:
        _C.decoder_pass(
            shape=(*feat.shape, len(layers[-1]), len(layers[1]) // 32),
            feat=feat.data_ptr(),
            parameters=_addresses(layers),
            outputs=_addresses(outputs),
            **how(feat.dtype),
        )
    return _last_first(outputs, keep)


def _decode_backward(
    call: ImageDecoder, results: list[Tensor], grads: list[Tensor | None], needs: frozenset[str]
) -> Gradients:
    feat, layers, grad = call.feat, call.layers, grads[0]
    if len(feat) == 0 or grad is None:
        return {"feat": torch.zeros_like(feat), "layers": [torch.zeros_like(x) for x in layers]}
    grad, of_layers = grad.contiguous(), [torch.empty_like(x) for x in layers]
    of_feat = feat.new_empty(feat.shape, dtype=layers[0].dtype)
    _C.decoder_pass(
        shape=(*feat.shape, len(layers[-1]), len(layers[1]) // 32),
        feat=feat.data_ptr(),
        parameters=_addresses(layers),
        outputs=_addresses(results[::-1]),
        grad=grad.data_ptr(),
        gradients=_addresses(of_layers),
        feat_grad=of_feat.data_ptr(),
        **how(feat.dtype),
    )
    return {"feat": of_feat.to(feat.dtype), "layers": of_layers}


_encoded = Kernel(
    "image_encoder_cpu",
    ImageEncoder,
    outputs=1,
    forward=_encode,
    backward=_encode_backward,
    fake=lambda call, keep: _last_first(_encoder_outputs(call), keep),
)
_decoded = Kernel(
    "image_decoder_cpu",
    ImageDecoder,
    outputs=1,
    forward=_decode,
    backward=_decode_backward,
    fake=lambda call, keep: _last_first(_decoder_outputs(call), keep),
)


# ---- what the table names


def _prepared(layers: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.to(state_dtype(dtype)).contiguous() for x in layers]


def image_encoder(image: Tensor, layers: list[Tensor], dtype: torch.dtype) -> Tensor:
    """See :func:`apv_fast.reference.image_model.image_encoder`."""
    leading = image.shape[:-3]
    x = image.reshape(leading.numel(), *image.shape[-3:]).contiguous()
    x = x if image.dtype == torch.uint8 else x.to(dtype)
    (embed,) = _encoded(x, _prepared(layers, dtype), dtype)
    return embed.reshape(*leading, 4 * embed.shape[-1])  # of 2×2 pixels


def image_decoder(feat: Tensor, layers: list[Tensor], dtype: torch.dtype) -> Tensor:
    """See :func:`apv_fast.reference.image_model.image_decoder`."""
    leading = feat.shape[:-1]
    x = feat.reshape(leading.numel(), feat.shape[-1]).to(dtype).contiguous()
    (mean,) = _decoded(x, _prepared(layers, dtype), dtype)
    return mean.reshape(*leading, *mean.shape[1:])


def obstacle(tensor: Tensor, **_: int) -> str:
    """Why convolutions in the dtype of ``tensor`` cannot run here; empty if they can."""
    return "its convolutions do not take torch.float16" if tensor.dtype == torch.float16 else ""

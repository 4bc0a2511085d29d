"""The image encoder and decoder of DreamerV2 (Hafner et al. 2021) in plain PyTorch; on a GPU they are cuDNN's work."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apv_fast.reference.image_loss import normalize_image


def _cast(weight: Tensor, x: Tensor) -> Tensor:
    """A convolution's weight in the dtype of its input ``x``; on a GPU with channels last, like ``x``.

    Otherwise cuDNN would transpose the weights in every call: here the cast does it on its way.
    """
    return weight.to(x.dtype, memory_format=torch.channels_last if x.is_cuda else torch.preserve_format)


def image_encoder(image: Tensor, layers: list[Tensor], dtype: torch.dtype) -> Tensor:
    """``[..., 64, 64, C] → [..., E]``, E = height, width, channel; see :func:`apv_fast.ops.image_encoder`."""
    x = image
    if image.dtype == torch.uint8:
        x = normalize_image(image, torch.promote_types(dtype, torch.float32))
    leading = x.shape[:-3]
    x = x.reshape(leading.numel(), *x.shape[-3:]).permute(0, 3, 1, 2).to(dtype)  # channels last in memory
    for weight, bias in zip(layers[::2], layers[1::2], strict=True):
        x = F.elu(F.conv2d(x, _cast(weight, x), bias.to(dtype), stride=2))
    x = x.permute(0, 2, 3, 1).reshape(*leading, x.shape[1] * x.shape[2] * x.shape[3])
    return x.to(torch.promote_types(dtype, torch.float32))


def image_decoder(feat: Tensor, layers: list[Tensor], dtype: torch.dtype) -> Tensor:
    """``[..., F] → [..., 64, 64, C]`` in ``dtype``; see :func:`apv_fast.ops.image_decoder`."""
    dense_weight, dense_bias, *rest = layers
    x = F.linear(feat.to(dtype), dense_weight.to(dtype), dense_bias.to(dtype))
    leading = x.shape[:-1]
    x = x.reshape(leading.numel(), x.shape[-1], 1, 1)
    if x.is_cuda:  # then all that follow have their channels last too
        x = x.contiguous(memory_format=torch.channels_last)
    images = transposed_convolutions(x, rest)
    return images.reshape(*leading, *images.shape[1:])


def transposed_convolutions(x: Tensor, layers: list[Tensor]) -> Tensor:
    """Stride 2, ELU between them: ``[N, channels, side, side]`` to images ``[N, 64, 64, C]``."""
    convs = list(zip(layers[::2], layers[1::2], strict=True))
    for i, (weight, bias) in enumerate(convs):
        x = F.conv_transpose2d(x, _cast(weight, x), bias.to(x.dtype), stride=2)
        x = x if i == len(convs) - 1 else F.elu(x)
    return x.permute(0, 2, 3, 1)

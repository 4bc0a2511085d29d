"""The image encoder and decoder for GPUs: cuDNN's convolutions, but the first transposed one is a product.

That one sees images of 1×1 pixel, so its 5×5 outputs are ``x [N, E] · W [E, 25·channels]``, which cuBLAS multiplies at
the rate of any large product; as a convolution cuDNN scatters 25 products that add to nothing. The product leaves its
channels last, as the convolutions behind it read them. Nothing here is a kernel of our own, and autograd is PyTorch's.

Floor at full size, 2500 images, bfloat16: 37 GFLOP a pass, 47 µs at 780 TFLOP/s.

Limits: in float32 it is a product, for which PyTorch takes tf32 only where it is told to, while it lets convolutions
have it by default.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apv_fast.reference import image_model as reference

from .image_loss import normalize_image


def image_encoder(image: Tensor, layers: list[Tensor], dtype: torch.dtype) -> Tensor:
    """See :func:`apv_fast.reference.image_model.image_encoder`; bytes become numbers of ``dtype`` in one pass."""
    x = normalize_image(image, dtype) if image.dtype == torch.uint8 and image.is_cuda else image
    return reference.image_encoder(x, layers, dtype)


def image_decoder(feat: Tensor, layers: list[Tensor], dtype: torch.dtype) -> Tensor:
    """See :func:`apv_fast.reference.image_model.image_decoder`."""
    dense_weight, dense_bias, weight, bias, *rest = layers
    leading, kernel = feat.shape[:-1], weight.shape[2]
    flat = feat.reshape(leading.numel(), feat.shape[-1]).to(dtype)
    x = F.linear(flat, dense_weight.to(dtype), dense_bias.to(dtype))
    columns = weight.permute(0, 2, 3, 1).to(dtype, memory_format=torch.contiguous_format)  # [E, i, j, channels]
    x = torch.addmm(bias.to(dtype).repeat(kernel * kernel), x, columns.flatten(1))
    x = F.elu(x).view(len(x), kernel, kernel, len(bias)).permute(0, 3, 1, 2)
    if not x.is_cuda:  # a CPU's convolutions round worse with channels last; the reference spares them that too
        x = x.contiguous()
    images = reference.transposed_convolutions(x, rest)
    return images.reshape(*leading, *images.shape[1:])

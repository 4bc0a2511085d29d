"""Images: the reconstruction loss, and what the model sees of their bytes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from apv_fast.ops.check import Arguments
from apv_fast.ops.op import Op


class ImageLoss(NamedTuple):
    """Checked arguments of :func:`image_loss`."""

    mean: Tensor  # [..., H, W, C]
    image: Tensor  # [..., H, W, C] uint8


class NormalizeImage(NamedTuple):
    """Checked arguments of :func:`normalize_image`."""

    image: Tensor  # [..., H, W, C] uint8
    dtype: torch.dtype


def _in_dtype(call: NormalizeImage) -> Tensor:
    """Backends are asked about floating dtypes: uint8 is not what they compute in."""
    return torch.empty(0, dtype=call.dtype, device=call.image.device)


LOSS: Op[ImageLoss, Tensor] = Op("image_loss", ImageLoss, decides=lambda call: call.mean)
NORMALIZE: Op[NormalizeImage, Tensor] = Op("normalize_image", NormalizeImage, decides=_in_dtype)


def like_normalized(call: NormalizeImage, _: bool) -> list[Tensor]:
    """Empty normalised images, contiguous."""
    return [call.image.new_empty(call.image.shape, dtype=call.dtype)]


def _dims(tensor: Tensor) -> str:
    """Names for [..., H, W, C]."""
    leading = tensor.dim() - 3 if isinstance(tensor, Tensor) else 0
    return " ".join([*(f"N{i}" for i in range(leading)), "H", "W", "C"])


def image_loss(mean: Tensor, image: Tensor, *, backend: str | None = None) -> Tensor:
    """``−mean over images of Σ_pixels log N(image/255 − 0.5 | mean, 1)``, the constant included.

    Args:
        mean: ``[..., H, W, C]``, any floating dtype and strides; the arithmetic is in float32 at least.
        image: the same shape, uint8.
        backend: see :mod:`apv_fast.backend`.

    Returns:
        A scalar in float32 (float64 if ``mean`` is), differentiable with respect to ``mean``.

    Raises:
        TypeError: ``mean`` is not floating or ``image`` not uint8.
        ValueError: shapes do not fit.

    Source: Hafner et al. 2019, equation 3.
    """
    arguments = Arguments("image_loss")
    arguments.tensor("mean", mean, _dims(mean))
    arguments.tensor("image", image, _dims(mean), torch.uint8)
    return LOSS(ImageLoss(mean, image), backend)


def normalize_image(image: Tensor, dtype: torch.dtype = torch.float32, *, backend: str | None = None) -> Tensor:
    """``image / 255 − 0.5``: what the model sees of uint8 images ``[..., H, W, C]``, in ``dtype``.

    The arithmetic is in float32 at least. Where the kernel for GPUs runs, the result is contiguous: with its last
    dimension moved before H and W it is a convolution's input in channels-last memory.

    Raises:
        TypeError: ``image`` is not uint8, or ``dtype`` not floating.
        ValueError: ``image`` has fewer than three dimensions.
    """
    arguments = Arguments("normalize_image")
    arguments.tensor("image", image, _dims(image), torch.uint8)
    if not dtype.is_floating_point:
        raise TypeError(f"normalize_image: dtype is {dtype}; it must be a floating-point dtype")
    return NORMALIZE(NormalizeImage(image, dtype), backend)

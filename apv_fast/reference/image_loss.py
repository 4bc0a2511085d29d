"""The Gaussian reconstruction loss of images, and what the model sees of their bytes (Hafner et al. 2019, eq. 3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def normalize_image(image: Tensor, dtype: torch.dtype) -> Tensor:
    """``image / 255 − 0.5`` of uint8 images, computed in float32 at least, in ``dtype``."""
    return (image.to(torch.promote_types(dtype, torch.float32)) / 255 - 0.5).to(dtype)


def image_loss(mean: Tensor, image: Tensor) -> Tensor:
    """``−mean over images of Σ log N(x | mean, 1)`` of means and uint8 images ``[..., H, W, C]``; a scalar."""
    mean = mean.to(torch.promote_types(mean.dtype, torch.float32))
    x = normalize_image(image, mean.dtype)
    log_prob = -0.5 * (x - mean).square() - 0.5 * math.log(2 * math.pi)
    return -log_prob.sum((-3, -2, -1)).mean()

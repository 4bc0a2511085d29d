"""The image encoder and decoder: all layers in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apv_fast.ops.check import Arguments
from apv_fast.ops.op import Op

SIZE = 64  # of images
ENCODER_KERNELS = (4, 4, 4, 4)
DECODER_KERNELS = (5, 5, 6, 6)

Layers = Sequence[tuple[Tensor, Tensor]]  # (weight, bias) of every layer, first to last


class ImageEncoder(NamedTuple):
    """Checked arguments of :func:`image_encoder`."""

    image: Tensor  # [..., 64, 64, C]
    layers: list[Tensor]  # weight and bias in turn
    dtype: torch.dtype


class ImageDecoder(NamedTuple):
    """Checked arguments of :func:`image_decoder`."""

    feat: Tensor  # [..., F]
    layers: list[Tensor]  # weight and bias in turn
    dtype: torch.dtype


def _in_dtype(call: ImageEncoder | ImageDecoder) -> Tensor:
    """Backends are asked about what they compute in."""
    return torch.empty(0, dtype=call.dtype, device=call[0].device)


ENCODER: Op[ImageEncoder, Tensor] = Op(
    "image_encoder", ImageEncoder, decides=_in_dtype, sizes=lambda call: {"channels": call.image.shape[-1]}
)
DECODER: Op[ImageDecoder, Tensor] = Op(
    "image_decoder", ImageDecoder, decides=_in_dtype, sizes=lambda call: {"channels": len(call.layers[-1])}
)


def _leading(x: Tensor, own: int) -> list[str]:
    """Names for the dimensions before the last ``own``."""
    return [f"N{i}" for i in range(x.dim() - own)] if isinstance(x, Tensor) else []


def _check_dtype(op: str, dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        raise TypeError(f"{op}: dtype is {dtype}; it must be a floating-point dtype")


def image_encoder(
    image: Tensor, layers: Layers, *, dtype: torch.dtype = torch.float32, backend: str | None = None
) -> Tensor:
    """Four convolutions, kernel 4, stride 2, ELU after each: images ``[..., 64, 64, C]`` to ``[..., 32·D]``.

    Args:
        image: uint8, of which the model sees ``image / 255 − 0.5``, or floating as it is.
        layers: weights ``[D·2ˡ, channels before, 4, 4]`` and biases ``[D·2ˡ]``, l < 4, any floating dtype.
        dtype: of the convolutions.
        backend: see :mod:`apv_fast.backend`.

    Returns:
        The last layer in the order height, width, channel; float32 (float64 if ``dtype`` is). Differentiable with
        respect to everything but uint8 images.

    Raises:
        TypeError: an argument is no tensor, or of the wrong dtype.
        ValueError: shapes do not fit.
    """
    arguments = Arguments("image_encoder", H=SIZE, W=SIZE, K=4)
    _check_dtype("image_encoder", dtype)
    integral = isinstance(image, Tensor) and not image.is_floating_point()
    arguments.tensor("image", image, " ".join([*_leading(image, 3), "H W C"]), torch.uint8 if integral else None)
    arguments.require(len(layers) == len(ENCODER_KERNELS), f"layers has {len(layers)} entries; there must be 4")
    before = "C"
    for i, (weight, bias) in enumerate(layers):
        arguments.tensor(f"layers[{i}] weight", weight, f"D{i} {before} K K")
        arguments.tensor(f"layers[{i}] bias", bias, f"D{i}")
        before = f"D{i}"
        arguments.sizes.setdefault(f"D{i + 1}", 2 * weight.shape[0])
    flat = [tensor for layer in layers for tensor in layer]
    return ENCODER(ImageEncoder(image, flat, dtype), backend)


def image_decoder(
    feat: Tensor, layers: Layers, *, dtype: torch.dtype = torch.float32, backend: str | None = None
) -> Tensor:
    """A dense layer to 32·D, then transposed convolutions, kernels 5, 5, 6, 6, stride 2, ELU on all but the last.

    Args:
        feat: ``[..., F]``, any floating dtype.
        layers: the dense layer's weight ``[32·D, F]`` and bias; then weights ``[channels before, channels, K, K]``,
            with channels D·(4, 2, 1) and the image's, and biases ``[channels]``; any floating dtype.
        dtype: of the products.
        backend: see :mod:`apv_fast.backend`.

    Returns:
        ``[..., 64, 64, C]`` in ``dtype``, differentiable with respect to everything. The reference leaves it with its
        channels first in memory.

    Raises:
        TypeError: an argument is no floating tensor.
        ValueError: shapes do not fit.
    """
    arguments = Arguments("image_decoder", **{f"K{i}": kernel for i, kernel in enumerate(DECODER_KERNELS)})
    _check_dtype("image_decoder", dtype)
    arguments.tensor("feat", feat, " ".join([*_leading(feat, 1), "F"]))
    arguments.require(feat.shape[-1] > 0, "feat has no features; F must be at least 1")
    arguments.require(len(layers) == 5, f"layers has {len(layers)} entries; there must be 5")
    arguments.tensor("layers[0] weight", layers[0][0], "E F")
    arguments.tensor("layers[0] bias", layers[0][1], "E")
    width = arguments.sizes["E"]
    arguments.require(width % 32 == 0 and width > 0, f"layers[0] has {width} outputs; it must be a multiple of 32")
    arguments.sizes |= {"C0": width // 8, "C1": width // 16, "C2": width // 32}
    before = "E"
    for i, (weight, bias) in enumerate(layers[1:]):
        arguments.tensor(f"layers[{i + 1}] weight", weight, f"{before} C{i} K{i} K{i}")
        arguments.tensor(f"layers[{i + 1}] bias", bias, f"C{i}")
        before = f"C{i}"
    flat = [tensor for layer in layers for tensor in layer]
    return DECODER(ImageDecoder(feat, flat, dtype), backend)

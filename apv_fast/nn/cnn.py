"""The image encoder and decoder of DreamerV2 (Hafner et al. 2021) for 64×64 images, channels last."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from apv_fast.nn.init import keras_init
from apv_fast.nn.saving import Savable
from apv_fast.ops.image_model import DECODER_KERNELS, image_decoder, image_encoder

IMAGE_SIZE = 64


def normalize(image: Tensor) -> Tensor:
    """What the model sees of a uint8 image: ``image / 255 − 0.5`` in float32."""
    return image.to(torch.float32) / 255 - 0.5


def _parameters(*layers: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return [(layer.weight, layer.bias) for layer in layers]  # type: ignore[misc]


class Encoder(Savable):
    """Four convolutions, kernel 4, stride 2, ``depth``·(1, 2, 4, 8) channels, ELU; images to ``[..., 32·depth]``.

    Args:
        depth: channels of the first convolution.
        channels: of the images.
        dtype: of the convolutions; the weights stay float32.
        backend: see :mod:`apv_fast.backend`.
    """

    def __init__(
        self, depth: int = 48, *, channels: int = 3, dtype: torch.dtype = torch.float32, backend: str = "auto"
    ) -> None:
        super().__init__()
        widths = [channels, depth, 2 * depth, 4 * depth, 8 * depth]
        pairs = itertools.pairwise(widths)
        self.convs = nn.ModuleList(nn.Conv2d(before, after, 4, stride=2) for before, after in pairs)
        self.embed_dim, self.channels, self.dtype, self.backend = 32 * depth, channels, dtype, backend
        keras_init(self)

    def forward(self, image: Tensor) -> Tensor:
        """Embed images: uint8, or float as :func:`normalize` gives; flattened in the order height, width, channel.

        Raises:
            TypeError: they are neither uint8 nor floating.
            ValueError: the images do not have the shape ``[..., 64, 64, channels]``.
        """
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise TypeError(f"Encoder: image has dtype {image.dtype}; it must be torch.uint8 or floating")
        expected = (IMAGE_SIZE, IMAGE_SIZE, self.channels)
        if tuple(image.shape[-3:]) != expected:
            raise ValueError(f"Encoder: image has shape {tuple(image.shape)}; it must end in {expected}")
        return image_encoder(image, _parameters(*self.convs), dtype=self.dtype, backend=self.backend)


class Decoder(Savable):
    """Dense to 32·``depth``, then four transposed convolutions, kernels 5, 5, 6, 6, stride 2, ELU on all but the last.

    Args:
        feat_dim: width of the features.
        depth: channels are ``depth``·(4, 2, 1), then the image's.
        channels: of the images.
        dtype: of the products; the weights stay float32.
        backend: see :mod:`apv_fast.backend`.
    """

    def __init__(
        self,
        feat_dim: int,
        depth: int = 48,
        *,
        channels: int = 3,
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.dense = nn.Linear(feat_dim, 32 * depth)
        widths = [32 * depth, 4 * depth, 2 * depth, depth, channels]
        shapes = zip(widths, widths[1:], DECODER_KERNELS, strict=False)
        self.convs = nn.ModuleList(nn.ConvTranspose2d(*shape, stride=2) for shape in shapes)
        self.dtype, self.backend = dtype, backend
        keras_init(self)

    def forward(self, feat: Tensor) -> Tensor:
        """Mean images ``[..., 64, 64, channels]`` for features ``[..., F]``; the image is Normal(mean, 1) around it."""
        return self.mean(feat).to(torch.promote_types(self.dtype, torch.float32))

    def mean(self, feat: Tensor) -> Tensor:
        """The same in the dtype of the products and where the last one left it: for a loss that reads it in place.

        Raises:
            ValueError: the last size of ``feat`` is not what the decoder takes.
        """
        if feat.shape[-1] != self.dense.in_features:
            raise ValueError(
                f"the features have shape {tuple(feat.shape)}; their last size must be {self.dense.in_features}"
            )
        return image_decoder(feat, _parameters(self.dense, *self.convs), dtype=self.dtype, backend=self.backend)

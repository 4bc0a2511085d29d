"""The image encoder and decoder of DreamerV2 (Hafner et al. 2021) for 64×64 images, channels last."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apv_fast.nn.init import dense, keras_init
from apv_fast.ops.image_loss import normalize_image

IMAGE_SIZE = 64


def normalize(image: Tensor) -> Tensor:
    """What the model sees of a uint8 image: ``image / 255 − 0.5`` in float32."""
    return image.to(torch.float32) / 255 - 0.5


def _weights(conv: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """A convolution's weight and bias in the dtype of its input ``x``; on a GPU with channels last, like ``x``.

    Otherwise cuDNN would transpose the weights in every call: here the cast does it on its way.
    """
    assert isinstance(conv, nn.Conv2d | nn.ConvTranspose2d) and conv.bias is not None
    layout = torch.channels_last if x.is_cuda else torch.preserve_format
    return conv.weight.to(x.dtype, memory_format=layout), conv.bias.to(x.dtype)


class Encoder(nn.Module):
    """Four convolutions, kernel 4, stride 2, ``depth``·(1, 2, 4, 8) channels, ELU; images to ``[..., 32·depth]``.

    Args:
        depth: channels of the first convolution.
        channels: of the images.
        dtype: of the convolutions; the weights stay float32.
    """

    def __init__(self, depth: int = 48, *, channels: int = 3, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        widths = [channels, depth, 2 * depth, 4 * depth, 8 * depth]
        pairs = itertools.pairwise(widths)
        self.convs = nn.ModuleList(nn.Conv2d(before, after, 4, stride=2) for before, after in pairs)
        self.embed_dim, self.channels, self.dtype = 32 * depth, channels, dtype
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
        if image.dtype != torch.uint8:
            x = image
        elif image.is_cuda:
            x = normalize_image(image, self.dtype)  # one pass
        else:
            x = normalize(image)
        leading = x.shape[:-3]
        x = x.reshape(-1, *expected).permute(0, 3, 1, 2).to(self.dtype)  # channels last in memory
        for conv in self.convs:
            x = F.elu(F.conv2d(x, *_weights(conv, x), stride=2))
        return x.permute(0, 2, 3, 1).reshape(*leading, -1).to(torch.promote_types(self.dtype, torch.float32))


class Decoder(nn.Module):
    """Dense to 32·``depth``, then four transposed convolutions, kernels 5, 5, 6, 6, stride 2, ELU on all but the last.

    Args:
        feat_dim: width of the features.
        depth: channels are ``depth``·(4, 2, 1), then the image's.
        channels: of the images.
        dtype: of the products; the weights stay float32.
    """

    def __init__(
        self, feat_dim: int, depth: int = 48, *, channels: int = 3, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.dense = nn.Linear(feat_dim, 32 * depth)
        shapes = [(32 * depth, 4 * depth, 5), (4 * depth, 2 * depth, 5), (2 * depth, depth, 6), (depth, channels, 6)]
        self.convs = nn.ModuleList(nn.ConvTranspose2d(*shape, stride=2) for shape in shapes)
        self.dtype = dtype
        keras_init(self)

    def forward(self, feat: Tensor) -> Tensor:
        """Mean images ``[..., 64, 64, channels]`` for features ``[..., F]``; the image is Normal(mean, 1) around it."""
        return self.mean(feat).to(torch.promote_types(self.dtype, torch.float32))

    def mean(self, feat: Tensor) -> Tensor:
        """The same in the dtype of the products and where the last one left it: for a loss that reads it in place."""
        x = dense(self.dense, feat, self.dtype)
        leading = x.shape[:-1]
        x = x.reshape(-1, x.shape[-1], 1, 1)
        if x.is_cuda:  # then all that follow have their channels last too
            x = x.contiguous(memory_format=torch.channels_last)
        for index, conv in enumerate(self.convs):
            x = F.conv_transpose2d(x, *_weights(conv, x), stride=2)
            x = x if index == len(self.convs) - 1 else F.elu(x)
        x = x.permute(0, 2, 3, 1)
        return x.reshape(*leading, *x.shape[1:])

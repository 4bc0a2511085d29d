"""Problems for ``image_encoder`` and ``image_decoder``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from apv_fast.nn import Decoder, Encoder
from apv_fast.ops import image_decoder, image_encoder
from tests.support.yardstick import seed_of

Case = tuple[Tensor, list[Tensor], Tensor]


def case(kind: str, size: tuple[int, int, int, int], dtype: torch.dtype, seed: int = 0) -> Case:
    """What goes in (uint8 or a leaf), the layers (leaves), and a cotangent."""
    n, depth, channels, features = size
    generator = torch.Generator().manual_seed(seed_of(seed + 10 * n))
    wide = torch.promote_types(dtype, torch.float32)
    with torch.random.fork_rng(devices=[]):  # its scales are part of the case
        torch.manual_seed(seed_of(seed))
        module = Decoder(features, depth, channels=channels) if kind == "decoder" else Encoder(depth, channels=channels)
    layers = []
    for p in module.parameters():
        scale = 0.3 if p.dim() == 1 else 1.5 * p.detach().std().item() if p.numel() > 1 else 1.0
        layers.append((scale * torch.randn(p.shape, generator=generator)).to(wide).requires_grad_())
    if kind == "decoder":
        x = torch.randn(n, features, generator=generator).to(dtype).requires_grad_()
        return x, layers, torch.randn(n, 64, 64, channels, generator=generator).to(dtype)
    image = torch.randint(256, (n, 64, 64, channels), dtype=torch.uint8, generator=generator)
    x = image if kind == "bytes" else (image / 255 - 0.5).to(dtype).requires_grad_()
    return x, layers, torch.randn(n, 32 * depth, generator=generator).to(wide)


def pairs(layers: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(layers[::2], layers[1::2], strict=True))


def run(
    kind: str, x: Tensor, layers: list[Tensor], cotangent: Tensor, dtype: torch.dtype, backend: str
) -> list[Tensor]:
    """Output and gradients."""
    op: Callable[..., Tensor] = image_decoder if kind == "decoder" else image_encoder
    y = op(x, pairs(layers), dtype=dtype, backend=backend)
    leaves = [leaf for leaf in (x, *layers) if leaf.requires_grad]
    return [y.detach(), *(torch.autograd.grad(y, leaves, cotangent) if leaves else ())]

"""Images: the reconstruction loss, and bytes made into what the encoder sees."""

from __future__ import annotations

import torch
from torch import Tensor

from apv_fast import ops
from bench.registry import (
    BF16,
    COMPILED,
    FORWARD,
    FP32,
    REFERENCE,
    OnDevice,
    Other,
    Passes,
    Problem,
    case,
    differentiable,
)

DTYPES = (FP32, BF16)
SMALL, PAPER = {"B": 16, "T": 25}, {"B": 50, "T": 50}


def _images(device: torch.device, B: int, T: int) -> Tensor:
    return torch.randint(256, (B, T, 64, 64, 3), dtype=torch.uint8, device=device)


@case("image_loss", [SMALL], dtypes=DTYPES)
@case("image_loss", [PAPER], dtypes=DTYPES, device=OnDevice())
def image_loss(device: torch.device, dtype: torch.dtype, B: int, T: int) -> Problem:
    """Images of a batch, means without gaps, as the decoder leaves them on a GPU."""
    image = _images(device, B, T)
    leaves = [torch.randn(image.shape, device=device, dtype=dtype).requires_grad_()]

    def forward(backend: str) -> list[Tensor]:
        return [ops.image_loss(leaves[0], image, backend=backend)]

    return differentiable(forward, leaves)


@case("normalize_image", [SMALL], dtypes=DTYPES)
@case("normalize_image", [PAPER], dtypes=DTYPES, device=OnDevice())
def normalize_image(device: torch.device, dtype: torch.dtype, B: int, T: int) -> Problem:
    """The same images for the encoder; there is no gradient."""
    image = _images(device, B, T)

    def run(name: str) -> object:
        return ops.normalize_image(image, dtype, backend=name)

    def compiled() -> Passes:
        function = torch.compile(ops.normalize_image, dynamic=False)
        return {FORWARD: lambda: function(image, dtype, backend=REFERENCE)}

    return Problem({FORWARD: run}, {COMPILED: Other(compiled)})

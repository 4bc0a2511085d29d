"""Images: the reconstruction loss, and bytes made into what the encoder sees."""

from __future__ import annotations

import torch
from torch import Tensor

from apv_fast import ops
from bench.registry import COMPILED, FORWARD, REFERENCE, Problem, case, differentiable

DTYPES = (torch.float32, torch.bfloat16)
BATCHES = [{"B": 16, "T": 25}, {"B": 50, "T": 50}]


def _images(device: torch.device, B: int, T: int) -> Tensor:
    return torch.randint(256, (B, T, 64, 64, 3), dtype=torch.uint8, device=device)


@case("image_loss", BATCHES, dtypes=DTYPES)
def image_loss(device: torch.device, dtype: torch.dtype, B: int, T: int) -> Problem:
    """Images of a batch, means without gaps, as the decoder leaves them on a GPU."""
    image = _images(device, B, T)
    leaves = [torch.randn(image.shape, device=device, dtype=dtype).requires_grad_()]

    def forward(backend: str) -> list[Tensor]:
        return [ops.image_loss(leaves[0], image, backend=backend)]

    return differentiable(forward, leaves)


@case("normalize_image", BATCHES, dtypes=DTYPES)
def normalize_image(device: torch.device, dtype: torch.dtype, B: int, T: int) -> Problem:
    """The same images for the encoder; there is no gradient."""
    image = _images(device, B, T)
    compiled = torch.compile(ops.normalize_image, dynamic=False)

    def run(name: str) -> object:
        if name == COMPILED:
            return compiled(image, dtype, backend=REFERENCE)
        return ops.normalize_image(image, dtype, backend=name)

    return Problem({FORWARD: run}, rivals=(COMPILED,))

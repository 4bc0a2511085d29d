"""The image encoder and decoder: all layers of a batch of videos in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from apv_fast.nn import Decoder, Encoder
from apv_fast.ops.image_model import image_decoder, image_encoder
from bench.registry import BF16, FP32, OnDevice, Problem, case, differentiable

DTYPES = (FP32, BF16)
BATCH = {"B": 16, "T": 25}


def _layers(*modules: torch.nn.Module) -> list[tuple[Tensor, Tensor]]:
    return [(module.weight, module.bias) for module in modules]  # type: ignore[misc]


@case("image_encoder", [BATCH | {"depth": 48}], dtypes=DTYPES, device=OnDevice())
@case("image_encoder", [BATCH | {"depth": 16}], dtypes=DTYPES)
def encoder(device: torch.device, dtype: torch.dtype, B: int, T: int, depth: int) -> Problem:
    """Bytes to embeddings; gradients of the weights, for the images have none."""
    model = Encoder(depth).to(device)
    image = torch.randint(256, (B, T, 64, 64, 3), dtype=torch.uint8, device=device)

    def forward(backend: str) -> list[Tensor]:
        return [image_encoder(image, _layers(*model.convs), dtype=dtype, backend=backend)]

    return differentiable(forward, list(model.parameters()), slow_to_compile=True)


@case("image_decoder", [BATCH | {"F": 2048, "depth": 48}], dtypes=DTYPES, device=OnDevice())
@case("image_decoder", [BATCH | {"F": 1224, "depth": 16}], dtypes=DTYPES)
def decoder(device: torch.device, dtype: torch.dtype, B: int, T: int, F: int, depth: int) -> Problem:
    """Features to images; gradients of both features and weights."""
    model = Decoder(F, depth).to(device)
    feat = torch.randn(B, T, F, device=device).requires_grad_()

    def forward(backend: str) -> list[Tensor]:
        return [image_decoder(feat, _layers(model.dense, *model.convs), dtype=dtype, backend=backend)]

    return differentiable(forward, [feat, *model.parameters()], slow_to_compile=True)

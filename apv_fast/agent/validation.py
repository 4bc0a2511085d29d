"""How well a video model does on videos that it has not learnt from."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from apv_fast.agent.world_model import Batch, VideoModel

MEASURED = ("image_loss", "kl_loss", "model_kl")


@torch.no_grad()
def validation_loss(model: VideoModel, batches: Iterable[Batch]) -> dict[str, float]:
    """Means over ``batches``, on any device: ``val_loss``, which training would minimise, and its parts.

    The latents' noise is fixed by the batch's number, so no random generator moves and values of different updates
    differ by the weights alone. Empty without a batch.
    """
    device = next(model.parameters()).device
    sums: dict[str, float] = {}
    count = 0
    for count, batch in enumerate(batches, 1):
        on_device = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        result = model.loss(on_device, noise=torch.tensor(count, device=device))
        for name, value in {"loss": result.loss, **{name: result.metrics[name] for name in MEASURED}}.items():
            sums[f"val_{name}"] = sums.get(f"val_{name}", 0.0) + value.item()
    return {name: value / count for name, value in sums.items()}

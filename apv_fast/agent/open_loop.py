"""Open-loop prediction: what a model imagines after a few frames of context, beside what happened."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from apv_fast.agent.world_model import Batch, StackNoise, VideoModel, WorldModel
from apv_fast.run import open_loop_grid

CONTEXT = 5  # frames that the model sees
SEQUENCES = 6


@torch.no_grad()
def open_loop(
    model: VideoModel | WorldModel, batch: Batch, context: int = CONTEXT, noise: Tensor | None = None
) -> Tensor:
    """Frames uint8 ``[B, T, 64, 64, 3]``: reconstructions of the first ``context`` steps, the rest imagined.

    ``noise``, an int64 scalar on the model's device, fixes all samples; without it torch's generator is used.

    Raises:
        ValueError: the sequences are not longer than the context.
    """
    length = batch["image"].shape[1]
    if length <= context:
        raise ValueError(f"open_loop: the sequences have {length} steps; they must have more than context = {context}")
    seen = {key: value[:, :context] for key, value in batch.items()}
    if isinstance(model, VideoModel):
        post, _ = model.rssm.observe(model.encoder(seen["image"]), seen["is_first"], noise=noise)
    else:
        post = model.observe(seen, StackNoise(noise, noise))["post"]
    last = {key: value[:, -1] for key, value in post.items()}
    action = batch["action"][:, context:] if isinstance(model, WorldModel) else None
    prior = model.rssm.imagine(last, action, length - context, noise=None if noise is None else noise + 1)
    feat = torch.cat([model.rssm.feat(post), model.rssm.feat(prior)], 1)
    return ((model.decoder(feat) + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def open_loop_video(model: VideoModel | WorldModel, batch: Batch, noise: Tensor | None = None) -> np.ndarray:
    """The official report, uint8 ``[T, 3·64, 6·64, 3]``: six sequences; truth, model and error above each other."""
    batch = {key: value[:SEQUENCES] for key, value in batch.items()}
    return open_loop_grid(batch["image"].cpu().numpy(), open_loop(model, batch, noise=noise).cpu().numpy())

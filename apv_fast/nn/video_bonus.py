"""APV's video-based intrinsic bonus: how far a window of action-free features is from those seen lately."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from apv_fast import ops
from apv_fast.nn.saving import Savable


class VideoBonus(Savable):
    """Distance of projected feature windows to their nearest neighbours in a queue of recent ones.

    Args:
        feat_dim: F, width of the action-free features.
        queue_size: rows that the queue holds, newest first.
        projection_dim: width of the random projection, fixed for the whole run.
        k: neighbours.
        window: τ, steps that are averaged.
        reduce: "mean" of the k distances (official code) or "kth", the k-th (paper).
        exclude_self: leave each window itself, which is in the queue at distance 0, out of its neighbours.
        backend: see :mod:`apv_fast.backend`.

    Source: Seo et al. 2022, section 3.3.
    """

    projection: Tensor
    queue: Tensor
    filled: Tensor

    def __init__(
        self,
        feat_dim: int,
        *,
        queue_size: int = 4096,
        projection_dim: int = 128,
        k: int = 16,
        window: int = 5,
        reduce: Literal["mean", "kth"] = "mean",
        exclude_self: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, value in (
            ("queue_size", queue_size),
            ("projection_dim", projection_dim),
            ("k", k),
            ("window", window),
        ):
            if value < 1:
                raise ValueError(f"VideoBonus: {name} is {value}; it must be at least 1")
        if reduce not in ("mean", "kth"):
            raise ValueError(f"VideoBonus: reduce is {reduce!r}; it must be 'mean' or 'kth'")
        self.k, self.window, self.exclude_self, self.backend = k, window, exclude_self, backend
        self.reduce: Literal["mean", "kth"] = reduce
        # The official code divides a standard normal by 128, whatever the projection's width.
        self.register_buffer("projection", torch.randn(feat_dim, projection_dim) / 128)
        self.register_buffer("queue", torch.zeros(queue_size, projection_dim))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, af_feat: Tensor) -> Tensor:
        """The bonus ``[B, T − window + 1]`` of features ``[B, T, F]``; pushes their windows onto the queue first.

        Raises:
            ValueError: ``af_feat`` has another shape, or fewer steps than a window.
        """
        if af_feat.dim() != 3 or af_feat.shape[-1] != len(self.projection):
            raise ValueError(
                f"VideoBonus: af_feat has shape {tuple(af_feat.shape)}; it must be [B, T, {len(self.projection)}]"
            )
        if af_feat.shape[1] < self.window:
            raise ValueError(f"VideoBonus: af_feat has {af_feat.shape[1]} steps; it must have at least {self.window}")
        bonus, queue, filled = ops.video_bonus(
            af_feat, self.projection, self.queue, self.filled,
            window=self.window, k=self.k, reduce=self.reduce, exclude_self=self.exclude_self, backend=self.backend,
        )  # fmt: skip
        self.queue.copy_(queue)
        self.filled.copy_(filled)
        return bonus

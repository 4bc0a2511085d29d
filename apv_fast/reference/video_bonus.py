"""APV's video-based bonus before it is normalised, with its queue (Seo et al. 2022, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor


def project_windows(af_feat: Tensor, projection: Tensor, window: int) -> Tensor:
    """Means over windows of ``window`` steps, projected; ``[B, T - window + 1, d]``."""
    return af_feat.to(projection.dtype).unfold(1, window, 1).mean(-1) @ projection


def push(rows: Tensor, queue: Tensor, filled: Tensor) -> tuple[Tensor, Tensor]:
    """The queue with ``rows`` at its front, and how much of it is filled; of too many rows the first ones stay."""
    return torch.cat([rows, queue])[: len(queue)], (filled + len(rows)).clamp(max=len(queue))


def video_bonus(
    af_feat: Tensor,
    projection: Tensor,
    queue: Tensor,
    filled: Tensor,
    window: int,
    k: int,
    reduce: str,
    exclude_self: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Bonus ``[B, T - window + 1]``, new queue and how much of it is filled; a count on the device stays there."""
    with torch.no_grad():
        windows = project_windows(af_feat, projection, window)  # [B, T', d]
        query = windows.flatten(0, 1)  # [Q, d]
        queue, filled = push(query, queue, filled)

        wide = torch.promote_types(query.dtype, torch.float32)
        distance = torch.cdist(query.to(wide), queue.to(wide), compute_mode="donot_use_mm_for_euclid_dist")  # [Q, N]
        key = torch.arange(len(queue), device=queue.device)
        row = torch.arange(len(query), device=queue.device)[:, None]
        absent = (key >= filled) | ((key == row) & exclude_self)
        others = filled - ((row < filled) & exclude_self).long()  # [Q, 1] neighbours that there are
        # NaN sorts behind everything, so that what is absent is never among the nearest of the others.
        nearest = distance.masked_fill(absent, torch.nan).topk(min(k, len(queue)), largest=False, sorted=True).values
        last = others.clamp(max=k) - 1  # [Q, 1]
        if reduce == "mean":
            taken = torch.arange(nearest.shape[1], device=queue.device) <= last
            bonus = nearest.where(taken, 0).sum(-1, keepdim=True) / (last + 1).clamp(min=1)
        else:
            bonus = nearest.gather(-1, last.clamp(min=0))
        bonus = bonus.where(last >= 0, 0)  # without any neighbour
        return bonus.to(query.dtype).view(windows.shape[:2]), queue, filled

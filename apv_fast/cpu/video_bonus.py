"""``video_bonus`` around the C++ nearest neighbours; reading the count of filled rows on the host is free here."""

from __future__ import annotations

import torch
from torch import Tensor

from apv_fast.cpu.knn_bonus import knn_bonus
from apv_fast.reference.video_bonus import project_windows, push


def _distance(query: Tensor, keys: Tensor, k: int, reduce: str, exclude_self: bool) -> Tensor:
    """``[Q]``; with ``exclude_self``, key i is left out of query i's neighbours."""
    if len(query) == 0:  # nor need there be a key
        return query.new_empty(0)
    if not exclude_self:
        return knn_bonus(query, keys, k, reduce)
    # Each row that the queue kept is its own nearest neighbour, at 0: take one more and drop it.
    kept, beyond = query[: len(keys)], query[len(keys) :]
    neighbours = min(k, len(keys) - 1)
    if neighbours == 0:
        distance = torch.zeros_like(kept[:, 0])
    else:
        distance = knn_bonus(kept, keys, neighbours + 1, reduce)
        distance = distance * (neighbours + 1) / neighbours if reduce == "mean" else distance
    return torch.cat([distance, knn_bonus(beyond, keys, k, reduce)]) if len(beyond) else distance


@torch.library.custom_op("apv_fast::video_bonus_cpu", mutates_args=())
def _video_bonus(
    af_feat: Tensor,
    projection: Tensor,
    queue: Tensor,
    filled: Tensor,
    window: int,
    k: int,
    reduce: str,
    exclude_self: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    windows = project_windows(af_feat, projection, window)  # [B, T', d]
    query = windows.flatten(0, 1)
    queue, filled = push(query, queue, filled)
    bonus = _distance(query, queue[: int(filled)], k, reduce, exclude_self)
    return bonus.view(windows.shape[:2]), queue, filled


@_video_bonus.register_fake
def _(
    af_feat: Tensor,
    projection: Tensor,
    queue: Tensor,
    filled: Tensor,
    window: int,
    k: int,
    reduce: str,
    exclude_self: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    bonus = queue.new_empty(af_feat.shape[0], af_feat.shape[1] - window + 1)
    return bonus, torch.empty_like(queue, memory_format=torch.contiguous_format), torch.empty_like(filled)


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
    """Bonus, new queue and how much of it is filled. ``apv_fast.ops`` has checked the arguments."""
    # No gradient flows through the op, so it needs none of autograd.
    tensors = (af_feat.detach(), projection.detach(), queue.detach(), filled)
    bonus, queue, filled = _video_bonus(*tensors, window, k, reduce, exclude_self)
    return bonus, queue, filled

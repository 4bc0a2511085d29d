"""``video_bonus`` around the C++ nearest neighbours; reading the count of filled rows on the host is free here."""

from __future__ import annotations

import torch
from torch import Tensor

from apv_fast.cpu.knn_bonus import knn_bonus
from apv_fast.ops.op import Kernel
from apv_fast.ops.video_bonus import Bonus, like_bonus
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


def _forward(call: Bonus, keep: bool) -> list[Tensor]:
    windows = project_windows(call.af_feat, call.projection, call.window)  # [B, T', d]
    query = windows.flatten(0, 1)
    queue, filled = push(query, call.queue, call.filled)
    bonus = _distance(query, queue[: int(filled)], call.k, call.reduce, call.exclude_self)
    return [bonus.view(windows.shape[:2]), queue, filled]


video_bonus = Kernel("video_bonus_cpu", Bonus, outputs=3, forward=_forward, fake=like_bonus)

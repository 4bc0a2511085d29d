"""Distance to the nearest neighbours: APV's intrinsic bonus before it is normalised (Seo et al. 2022, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor


def knn_bonus(query: Tensor, keys: Tensor, k: int, reduce: str) -> Tensor:
    """Mean, or last, of the k smallest ``‖query − key‖₂``; ``[Q]``."""
    with torch.no_grad():
        dtype = torch.promote_types(query.dtype, torch.float32)
        # Differences, not the expansion |q|² + |k|² − 2qk: every query lies in the queue itself, at distance 0.
        distance = torch.cdist(query.to(dtype), keys.to(dtype), compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distance.topk(min(k, len(keys)), dim=-1, largest=False, sorted=True).values  # [Q, k]
        return (nearest.mean(-1) if reduce == "mean" else nearest[:, -1]).to(query.dtype)

"""Nearest neighbours of the video bonus, also against the plain PyTorch way to do it."""

from __future__ import annotations

import torch

from apv_fast import ops
from bench.registry import FORWARD, Problem, case

PLAIN = "torch"  # cdist + topk with PyTorch's defaults: faster than the reference, and less exact near distance 0


@case(
    "knn_bonus",
    [
        {"Q": 2300, "N": 4096, "d": 128, "k": 16},  # B=50, T=50: the paper's Meta-world
        {"Q": 336, "N": 4096, "d": 128, "k": 16},  # B=16, T=25
        {"Q": 16, "N": 4096, "d": 128, "k": 16},
    ],
)
def knn_bonus(device: torch.device, dtype: torch.dtype, Q: int, N: int, d: int, k: int) -> Problem:
    """Queries are rows of the queue, as in training."""
    keys = torch.randn(N, d, device=device, dtype=dtype)
    query = keys[:Q].clone()

    def run(name: str) -> object:
        if name == PLAIN:
            return torch.cdist(query, keys).topk(k, dim=-1, largest=False).values.mean(-1)
        return ops.knn_bonus(query, keys, k=k, backend=name)

    return Problem({FORWARD: run}, rivals=(PLAIN,))

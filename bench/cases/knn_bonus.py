"""Nearest neighbours of the video bonus, also against the plain PyTorch way to do it; and the whole bonus."""

from __future__ import annotations

import functools
from typing import Any

import torch

from apv_fast import ops
from bench.registry import FORWARD, Problem, case

FAISS = "faiss"  # its flat index, where faiss is installed; it is given the keys beforehand
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

    @functools.cache
    def index() -> Any:
        import faiss  # type: ignore[import-not-found]

        faiss.omp_set_num_threads(torch.get_num_threads())
        made = faiss.IndexFlatL2(d)
        made.add(keys.numpy())
        return made

    def run(name: str) -> object:
        if name == PLAIN:
            return torch.cdist(query, keys).topk(k, dim=-1, largest=False).values.mean(-1)
        if name == FAISS:
            return torch.from_numpy(index().search(query.numpy(), k)[0]).sqrt_().mean(-1)
        return ops.knn_bonus(query, keys, k=k, backend=name)

    return Problem({FORWARD: run}, rivals=(PLAIN, FAISS))


@case(
    "video_bonus",
    [
        {"B": 50, "T": 50, "F": 2048, "N": 4096, "d": 128, "k": 16},  # the paper's Meta-world
        {"B": 16, "T": 25, "F": 2048, "N": 4096, "d": 128, "k": 16},
    ],
)
def video_bonus(device: torch.device, dtype: torch.dtype, B: int, T: int, F: int, N: int, d: int, k: int) -> Problem:
    """A full queue of windows like the new ones."""
    af_feat = torch.randn(B, T, F, device=device, dtype=dtype)
    projection = torch.randn(F, d, device=device, dtype=dtype) / d
    queue = torch.randn(N, F, device=device, dtype=dtype) @ projection / 5**0.5  # a mean over 5 steps
    filled = torch.tensor(N, device=device)

    def run(name: str) -> object:
        return ops.video_bonus(af_feat, projection, queue, filled, k=k, backend=name)

    return Problem({FORWARD: run})

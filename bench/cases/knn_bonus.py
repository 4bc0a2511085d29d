"""Nearest neighbours of the video bonus, also against the plain PyTorch way to do it."""

from __future__ import annotations

import torch

from apv_fast import ops
from bench.registry import FORWARD, PLAIN, OnDevice, Other, Passes, Problem, case

FAISS = "faiss"  # its flat index, where faiss is installed; it is given the keys beforehand
QUEUE = {"N": 4096, "d": 128, "k": 16}


@case("knn_bonus", [{"Q": 2300, **QUEUE}], device=OnDevice())  # B=50, T=50: the paper's Meta-world
@case("knn_bonus", [{"Q": 336, **QUEUE}, {"Q": 16, **QUEUE}])
def knn_bonus(device: torch.device, dtype: torch.dtype, Q: int, N: int, d: int, k: int) -> Problem:
    """Queries are rows of the queue, as in training."""
    keys = torch.randn(N, d, device=device, dtype=dtype)
    query = keys[:Q].clone()

    def run(name: str) -> object:
        return ops.knn_bonus(query, keys, k=k, backend=name)

    def plain() -> object:  # faster than the reference, and less exact near distance 0
        return torch.cdist(query, keys).topk(k, dim=-1, largest=False).values.mean(-1)

    def indexed() -> Passes:
        import faiss  # type: ignore[import-not-found]

        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatL2(d)
        index.add(keys.numpy())
        return {FORWARD: lambda: torch.from_numpy(index.search(query.numpy(), k)[0]).sqrt_().mean(-1)}

    return Problem({FORWARD: run}, {PLAIN: Other(lambda: {FORWARD: plain}), FAISS: Other(indexed)})

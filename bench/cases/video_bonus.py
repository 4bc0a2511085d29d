"""The whole bonus of a batch of videos: projection, windows, neighbours, the new queue."""

from __future__ import annotations

import torch

from apv_fast import ops
from bench.registry import FORWARD, OnDevice, Problem, case

SIZES = {"F": 2048, "N": 4096, "d": 128, "k": 16}


@case("video_bonus", [{"B": 50, "T": 50, **SIZES}], device=OnDevice())  # the paper's Meta-world
@case("video_bonus", [{"B": 16, "T": 25, **SIZES}])
def video_bonus(device: torch.device, dtype: torch.dtype, B: int, T: int, F: int, N: int, d: int, k: int) -> Problem:
    """A full queue of windows like the new ones."""
    af_feat = torch.randn(B, T, F, device=device, dtype=dtype)
    projection = torch.randn(F, d, device=device, dtype=dtype) / d
    queue = torch.randn(N, F, device=device, dtype=dtype) @ projection / 5**0.5  # a mean over 5 steps
    filled = torch.tensor(N, device=device)

    def run(name: str) -> object:
        return ops.video_bonus(af_feat, projection, queue, filled, k=k, backend=name)

    return Problem({FORWARD: run})

"""Replays of made-up episodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from apv_fast.data import Replay, write_episode
from tests.support.samples import make_episode, rows_of


def fill(directory: Path, lengths: list[int], **options: Any) -> list[Path]:
    return [write_episode(directory, make_episode(n, seed=index, **options)) for index, n in enumerate(lengths)]


def add(replay: Replay, length: int, seed: int = 0) -> Path | None:
    path = None
    for row in rows_of(make_episode(length, seed=seed)):
        path = replay.add(row)
    return path


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)

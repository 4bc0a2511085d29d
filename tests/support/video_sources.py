"""Stores and folders of videos whose frames say which they are, and what is drawn from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apv_fast.data import StoreWriter, VideoDataset, open_videos, write_episode
from tests.support.samples import make_episode

LENGTH = 5


def video(source: int, episode: int, frames: int) -> np.ndarray:
    """Frames that say in their first pixel whose they are: source, episode, time."""
    image = np.zeros((frames, 64, 64, 3), np.uint8)
    image[:, 0, 0] = np.stack([np.full(frames, source), np.full(frames, episode), np.arange(frames)], -1)
    image[:, 1:] = np.random.default_rng([source, episode]).integers(0, 256, 3)
    return image


def make_store(directory: Path, lengths: Sequence[int], source: int = 0, quality: str | None = None) -> Path:
    with StoreWriter(directory, creator="test") as writer:
        for episode, frames in enumerate(lengths):
            writer.append(f"{source}/{episode:04d}", video(source, episode, frames), quality=quality)
    return directory


def make_folder(directory: Path, lengths: Sequence[int], source: int = 1) -> Path:
    for episode, frames in enumerate(lengths):
        content = make_episode(frames - 1, video_only=True) | {"image": video(source, episode, frames)}
        write_episode(directory, content)
    return directory


def open_(*data: Path | str, **options: Any) -> VideoDataset:
    options = {"capacity_steps": 10**6, **options}
    return open_videos(data, chunk_length=LENGTH, **options)


def who(batch: Mapping[str, torch.Tensor]) -> np.ndarray:
    """Source, episode and first frame of every sequence, ``[B, 3]``; checks that the sequences are whole."""
    pixel = batch["image"][:, :, 0, 0].cpu().numpy().astype(int)
    first = pixel[:, :1]
    np.testing.assert_array_equal(pixel, first + np.arange(pixel.shape[1])[:, None] * [0, 0, 1])
    return pixel[:, 0]


def drawn(dataset: VideoDataset, count: int) -> np.ndarray:
    return np.concatenate([who(dataset.sample(100)) for _ in range(count // 100)])


def chi_square(counts: Sequence[int] | np.ndarray, shares: Sequence[float] | np.ndarray) -> float:
    expected = np.asarray(shares) * np.sum(counts)
    return float(((np.asarray(counts) - expected) ** 2 / expected).sum())

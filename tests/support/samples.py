"""Episodes for tests, and a disk that fills up."""

from __future__ import annotations

import contextlib
import io
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch


def make_episode(length: int, *, actions: int = 2, seed: int = 0, video_only: bool = False) -> dict[str, np.ndarray]:
    """An episode of ``length`` transitions whose frame t is filled with t, and whose reward t is 1000·seed + t."""
    rows = length + 1
    generator = np.random.default_rng(seed)
    flags = {name: np.zeros(rows, bool) for name in ("is_first", "is_last", "is_terminal")}
    flags["is_first"][0] = flags["is_last"][-1] = True
    image = np.broadcast_to(np.arange(rows, dtype=np.uint8)[:, None, None, None], (rows, 64, 64, 3)).copy()
    episode = {"image": image, **flags}
    if not video_only:
        episode["action"] = generator.uniform(-1, 1, (rows, actions)).astype(np.float32)
        episode["reward"] = (1000 * seed + np.arange(rows)).astype(np.float32)
    return episode


def rows_of(episode: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The episode as what an environment gives step by step."""
    return [{key: value[row] for key, value in episode.items()} for row in range(len(episode["image"]))]


@contextlib.contextmanager
def small_files(limit: int) -> Iterator[None]:
    """The system refuses to make any file larger than ``limit`` bytes: a real failing write, with no special rights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def small_disk(directory: Path, size: str) -> Iterator[Path]:
    """A file system of ``size`` mounted on ``directory``; skips the test where mounting is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a full file system needs the right to mount one")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """The state as a checkpoint gives it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded

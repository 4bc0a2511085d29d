"""Where episodes and their decoded frames are."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from apv_fast.data.episodes import EpisodeError

EPISODE_GLOB = "*.npz"


def episode_folder(directory: Path, *, create: bool = False) -> Path:
    """``directory/train_episodes`` if there is one (a run or a data set), else ``directory`` itself.

    Raises:
        EpisodeError: it does not exist, and is not to be made.
    """
    if (directory / "train_episodes").is_dir():
        return directory / "train_episodes"
    if create:
        directory.mkdir(parents=True, exist_ok=True)
    elif not directory.is_dir():
        raise EpisodeError(directory, "folder", "does not exist")
    return directory


def episode_files(folders: Iterable[Path]) -> list[Path]:
    """Every episode file, oldest first: names begin with the time. A name found in two folders counts once."""
    files = {path.name: path for folder in folders for path in folder.glob(EPISODE_GLOB)}
    return [files[name] for name in sorted(files)]


def cache_folder(episodes: Path) -> Path:
    """Where to keep decoded frames: beside the episodes if that is writable, else in the temporary folder.

    Not in the temporary folder first: that is RAM on many systems, and it is RAM that must not fill up.
    """
    return episodes if os.access(episodes, os.W_OK) else Path(tempfile.gettempdir())

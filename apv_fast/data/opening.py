"""From what ``--data`` says to a dataset: finds out what every entry is, and opens it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apv_fast.data.corpus import Corpus, StoreCorpus, open_folders
from apv_fast.data.episodes import EpisodeError
from apv_fast.data.folders import EPISODE_GLOB, episode_folder
from apv_fast.data.mixture import parse_entries
from apv_fast.data.store import is_store
from apv_fast.data.videos import VideoDataset


def open_videos(
    data: Sequence[Path | str], *, chunk_length: int, capacity_steps: int, cache: Path, **options: Any
) -> VideoDataset:
    """The videos of all entries as one dataset.

    Args:
        data: paths, or ``PATH:WEIGHT`` all of them.
        chunk_length: frames in a sequence.
        capacity_steps: steps to read from folders of episodes, the newest of all.
        cache: folder where stores are made of raw videos.
        options: of :class:`VideoDataset`.

    Raises:
        ValueError: the entries are not as they must be.
        EpisodeError: an entry does not exist, is damaged as a whole, or nothing usable is in it.
    """
    entries = parse_entries(data)
    folders = [entry.path for entry in entries if _is_episode_folder(entry.path)]
    opened: dict[Path, Corpus] = {}
    if folders:
        opened |= zip(folders, open_folders(folders, shortest=chunk_length, capacity_steps=capacity_steps), strict=True)
    for entry in entries:
        if entry.path in opened:
            continue
        if not entry.path.exists():
            raise EpisodeError(entry.path, "data", "does not exist")
        if not is_store(entry.path):
            raise EpisodeError(entry.path, "data", "is neither a store nor a folder of episodes")
        opened[entry.path] = StoreCorpus(entry.path)
    weights = [entry.weight for entry in entries if entry.weight is not None] or None
    return VideoDataset(
        [opened[entry.path] for entry in entries], chunk_length=chunk_length, weights=weights, **options
    )


def _is_episode_folder(path: Path) -> bool:
    """Whether there are episode files in it, or a run or data set that has them."""
    return path.is_dir() and not is_store(path) and any(episode_folder(path).glob(EPISODE_GLOB))

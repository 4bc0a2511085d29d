"""From what ``--data`` says to a dataset: finds out what every entry is, and opens it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from apv_fast.data.corpus import Corpus, StoreCorpus, open_folders
from apv_fast.data.episode_folders import EPISODE_GLOB, episode_folder
from apv_fast.data.episodes import EpisodeError
from apv_fast.data.mixture import parse_entries
from apv_fast.data.shards import SHARDS_FILE, VideoStream
from apv_fast.data.store import is_store
from apv_fast.data.video_dataset import VideoDataset


def open_videos(
    data: Sequence[Path | str],
    *,
    chunk_length: int,
    capacity_steps: int,
    store_of: Callable[[Path], Path] | None = None,
    **options: Any,
) -> VideoDataset:
    """The videos of all entries as one dataset.

    Args:
        data: paths, or ``PATH:WEIGHT`` all of them.
        chunk_length: frames in a sequence.
        capacity_steps: steps to read from folders of episodes, the newest of all.
        store_of: gives the store of raw videos, for entries that are nothing else; None: there are none.
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
    streams: dict[Path, VideoStream] = {}
    for entry in entries:
        if _is_shards(entry.path):
            streams[entry.path] = VideoStream(entry.path, chunk_length=chunk_length, seed=options.get("seed", 0))
        elif entry.path not in opened:
            opened[entry.path] = StoreCorpus(_store(entry.path, store_of))
    ordered = sorted(entries, key=lambda entry: entry.path in streams)  # as VideoDataset wants its weights
    weights = [entry.weight for entry in ordered if entry.weight is not None] or None
    corpora = [opened[entry.path] for entry in ordered if entry.path in opened]
    return VideoDataset(corpora, list(streams.values()), chunk_length=chunk_length, weights=weights, **options)


def _store(path: Path, store_of: Callable[[Path], Path] | None) -> Path:
    """The store in ``path``, or the one of the raw videos there."""
    if is_store(path):
        return path
    if store_of is None:
        problem = "is neither a store nor a folder of episodes" if path.exists() else "does not exist"
        raise EpisodeError(path, "data", problem)
    return store_of(path)


def _is_episode_folder(path: Path) -> bool:
    """Whether there are episode files in it, or a run or data set that has them."""
    return path.is_dir() and not is_store(path) and any(episode_folder(path).glob(EPISODE_GLOB))


def _is_shards(path: Path) -> bool:
    """Whether it is a file of shards, a pattern of such files, or a folder of them."""
    return path.suffix == ".tar" or (path / SHARDS_FILE).is_file()

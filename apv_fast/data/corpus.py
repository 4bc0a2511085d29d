"""Videos to draw from, as the sampler sees them: episodes by number, any of their frames at once."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from apv_fast.data.episode_folders import cache_folder, episode_files, episode_folder
from apv_fast.data.episodes import VIDEO_KEYS, EpisodeError, episode_length, read_episode
from apv_fast.data.frame_cache import FrameCache
from apv_fast.data.store import StoreError, VideoStore
from apv_fast.data.store_format import EPISODE
from apv_fast.data.video_metadata import VIEWS_AGREE, recorded_quality

FRAME_SHAPE = (64, 64, 3)
VERIFY_BYTES = 2**30  # stores up to this size are compared with their checksums when opened: a second


class Corpus(Protocol):
    """The videos of one place.

    Reading is safe from several threads at once; nothing else is.
    """

    source: str  # where it is, for messages
    names: list[str]  # of the episodes, by which a checkpoint knows them
    qualities: set[str]  # of rendering, as far as they are known
    skipped_short: int
    skipped_damaged: int

    @property
    def frames(self) -> np.ndarray:
        """How many every episode has, int64 ``[episodes]``."""
        ...

    @property
    def split_keys(self) -> np.ndarray:
        """What decides whether an episode is held out: CRC-32 of its frames, int64 ``[episodes]``; several views of
        one and the same episode have the least of theirs, so that they stay together."""
        ...

    def read_into(self, episode: int, start: int, out: np.ndarray) -> None:
        """Fill ``out``, uint8 ``[n, 64, 64, 3]`` and contiguous, with the frames from ``start`` on."""
        ...

    def select(self, names: Sequence[str]) -> None:
        """Keep exactly these episodes, in this order.

        Raises:
            EpisodeError: one is not there any more.
        """
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


class FolderCorpus:
    """A folder of official episode files. Each is inflated once, into a file outside of RAM."""

    def __init__(self, folder: Path, cache: FrameCache) -> None:
        quality = recorded_quality(folder)
        self.source, self.qualities = str(folder), {quality} if quality else set()
        self.skipped_short = self.skipped_damaged = 0
        self._folder, self._cache = folder, cache
        self._held: dict[str, tuple[int, int, int]] = {}  # place in the cache, frames and checksum, by name
        self.names: list[str] = []

    @property
    def frames(self) -> np.ndarray:
        """See :class:`Corpus`."""
        return np.array([self._held[name][1] for name in self.names], np.int64)

    @property
    def split_keys(self) -> np.ndarray:
        """See :class:`Corpus`."""
        return _least([name[:VIEWS_AGREE] for name in self.names], [self._held[name][2] for name in self.names])

    def add(self, path: Path) -> None:
        """Read one file.

        Raises:
            EpisodeError: it is damaged.
        """
        image = read_episode(path, VIDEO_KEYS, image_shape=FRAME_SHAPE)["image"]
        self._held[path.name] = self._cache.write(image), len(image), zlib.crc32(np.ascontiguousarray(image).data)
        self.names.append(path.name)

    def read_into(self, episode: int, start: int, out: np.ndarray) -> None:
        """See :class:`Corpus`."""
        self._cache.read_into(self._held[self.names[episode]][0] + start, out)

    def select(self, names: Sequence[str]) -> None:
        """See :class:`Corpus`. Files that are not held yet are read."""
        for name in names:
            if name not in self._held:
                self.add(self._folder / name)
        for name in self._held.keys() - set(names):
            place, frames, _ = self._held.pop(name)
            self._cache.free(place, frames)
        self.names = list(names)

    def close(self) -> None:
        """See :class:`Corpus`."""
        self._cache.close()


def open_folders(directories: Sequence[Path], *, shortest: int, capacity_steps: int) -> list[FolderCorpus]:
    """Folders of episode files: together the newest ``capacity_steps`` steps, newest first in each.

    Args:
        directories: folders of ``*.npz``, or with a folder ``train_episodes/`` that has them. A file name that is in
            two of them counts once.
        shortest: episodes of fewer frames are skipped and counted.
        capacity_steps: steps to hold.

    Raises:
        EpisodeError: a folder does not exist. (A damaged file only warns, and is counted.)
    """
    folders = [episode_folder(directory) for directory in directories]
    cache = FrameCache(cache_folder(folders[0]), frame_bytes=int(np.prod(FRAME_SHAPE)))
    corpora = {folder: FolderCorpus(folder, cache) for folder in folders}
    steps = 0
    for path in reversed(episode_files(folders)):
        corpus = corpora[path.parent]
        try:
            length = episode_length(path)
            if length + 1 < shortest:
                corpus.skipped_short += 1
                continue
            if steps and steps + length > capacity_steps:
                break
            corpus.add(path)
        except EpisodeError as error:
            corpus.skipped_damaged += 1
            warnings.warn(f"skipped a damaged episode: {error}", stacklevel=2)
            continue
        steps += length
    return [corpora[folder] for folder in folders]


class StoreCorpus:
    """A store, see :mod:`apv_fast.data.store`; nothing of it is held in memory but names and places.

    A store of up to ``verify_bytes`` is compared with its checksums first; episodes that differ are skipped, with a
    warning. ``apv-fast ingest`` does that for larger ones.

    Raises:
        StoreError: it is damaged as a whole, or its frames have another size.
    """

    def __init__(self, directory: Path, *, verify_bytes: int = VERIFY_BYTES) -> None:
        self.source, self._store = str(directory), VideoStore(directory)
        if self._store.image_shape != FRAME_SHAPE:
            problem = (
                f"must be {list(FRAME_SHAPE)}, not {list(self._store.image_shape)}; make the store anew at size 64"
            )
            raise StoreError(directory, "frames", problem)
        self.skipped_short = self.skipped_damaged = 0
        self.qualities: set[str] = set()
        self._numbers: dict[str, int] = {}  # in the store, by name
        damaged = self._damaged() if int(self._store.lengths.sum()) * math.prod(FRAME_SHAPE) <= verify_bytes else set()
        groups: list[str] = []
        checksums: list[int] = []
        for number, episode in enumerate(self._store):
            groups.append(str(episode.source.get(EPISODE, episode.name)))
            checksums.append(episode.crc32)
            if number in damaged:
                self.skipped_damaged += 1
                problem = "its frames are not those that were written (checksum)"
                warnings.warn(f"skipped a damaged episode: {directory}: {episode.name}: {problem}", stacklevel=2)
                continue
            self._numbers[episode.name] = number
            self.qualities |= {episode.quality} if episode.quality else set()
        self._split_keys = _least(groups, checksums)
        self.names: list[str] = []
        self.select(list(self._numbers))

    @property
    def frames(self) -> np.ndarray:
        """See :class:`Corpus`."""
        return self._store.lengths[self._chosen]

    @property
    def split_keys(self) -> np.ndarray:
        """See :class:`Corpus`."""
        return self._split_keys[self._chosen]

    def read_into(self, episode: int, start: int, out: np.ndarray) -> None:
        """See :class:`Corpus`."""
        self._store.read_into(int(self._chosen[episode]), start, out)

    def select(self, names: Sequence[str]) -> None:
        """See :class:`Corpus`."""
        if missing := next((name for name in names if name not in self._numbers), None):
            raise EpisodeError(self.source, missing, "is in the checkpoint and not in the store, or damaged by now")
        self.names = list(names)
        self._chosen = np.array([self._numbers[name] for name in names], np.int64)

    def close(self) -> None:
        """See :class:`Corpus`: there is nothing to give back."""

    def _damaged(self) -> set[int]:
        return {episode for episode, intact in self._store.verify() if not intact}


def _least(groups: Sequence[str], checksums: Sequence[int]) -> np.ndarray:
    """The least checksum of each one's group."""
    least: dict[str, int] = {}
    for group, checksum in zip(groups, checksums, strict=True):
        least[group] = min(checksum, least.get(group, checksum))
    return np.array([least[group] for group in groups], np.int64)

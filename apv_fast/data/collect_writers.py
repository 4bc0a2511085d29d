"""Folders that collected episodes are written to, in one of three formats, and the journal of what is finished.

``episodes.jsonl`` has a line an episode, written when all its videos are on the disk; an episode without a line is not
finished, and is written anew over what there may be of it. Names follow from an episode's number and camera, so the
order in which episodes were finished does not show.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from apv_fast.atomic_file import disk_error
from apv_fast.data.episodes import Episode, EpisodeError, read_episode, write_episode
from apv_fast.data.mp4 import read_mp4, write_mp4
from apv_fast.data.store import StoreWriter, VideoStore
from apv_fast.data.store_format import EPISODE
from apv_fast.data.video_metadata import mp4_name, npz_stem

Videos = Mapping[str, np.ndarray]  # camera -> uint8 [T, height, width, 3]


class EpisodeWriter(Protocol):
    """Writes the videos of episodes."""

    def write(self, index: int, videos: Videos, rows: Episode) -> None:
        """All videos of one episode; ``rows`` has what else is known of each frame."""

    def read(self, index: int, camera: str) -> np.ndarray:
        """One of its videos."""

    def close(self) -> None:
        """Let go of files."""


class NpzWriter:
    """Official episode files, those of all cameras in one folder.

    Args:
        directory: of the data set.
        created: when it was begun, ``YYYYMMDDTHHMMSS``.
        identity: what the data set is of, so that no two have files of the same names.
    """

    def __init__(self, directory: Path, created: str, identity: str) -> None:
        self._folder = directory / "train_episodes"
        self._begin = f"{created}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"

    def _stem(self, index: int, camera: str) -> str:
        return npz_stem(self._begin, index, camera)

    def write(self, index: int, videos: Videos, rows: Episode) -> None:
        """See :class:`EpisodeWriter`."""
        for camera, image in videos.items():
            write_episode(self._folder, {"image": image, **rows}, stem=self._stem(index, camera))

    def read(self, index: int, camera: str) -> np.ndarray:
        """See :class:`EpisodeWriter`."""
        (path,) = self._folder.glob(f"{self._stem(index, camera)}-*.npz")
        return read_episode(path, ("image",))["image"]

    def close(self) -> None:
        """See :class:`EpisodeWriter`."""


class Mp4Writer:
    """MP4 files, ``videos/000012-camera.mp4``; actions and rewards are left out."""

    def __init__(self, directory: Path, fps: float) -> None:
        self._folder, self._fps = directory / "videos", fps

    def _path(self, index: int, camera: str) -> Path:
        return self._folder / mp4_name(index, camera)

    def write(self, index: int, videos: Videos, rows: Episode) -> None:
        """See :class:`EpisodeWriter`."""
        for camera, image in videos.items():
            write_mp4(self._path(index, camera), image, fps=self._fps)

    def read(self, index: int, camera: str) -> np.ndarray:
        """See :class:`EpisodeWriter`."""
        return read_mp4(self._path(index, camera))

    def close(self) -> None:
        """See :class:`EpisodeWriter`."""


class VideoStoreWriter:
    """A store with the videos of every camera; actions and rewards are left out."""

    def __init__(self, directory: Path, fps: float, quality: str, size: int, settings: Mapping[str, Any]) -> None:
        self._directory, self._fps, self._quality = directory, fps, quality
        self._writer = StoreWriter(
            directory, height=size, width=size, creator="apv-fast collect", settings=dict(settings)
        )
        self._reader: VideoStore | None = None
        self._places: dict[str, int] = {}

    def write(self, index: int, videos: Videos, rows: Episode) -> None:
        """See :class:`EpisodeWriter`."""
        for camera, image in videos.items():
            name = _name(index, camera)
            if name not in self._writer:  # else an interrupted process got as far as this
                episode = {EPISODE: f"{index:06d}"}
                self._writer.append(name, image, fps=self._fps, camera=camera, quality=self._quality, source=episode)

    def read(self, index: int, camera: str) -> np.ndarray:
        """See :class:`EpisodeWriter`; knows what was there at the first call."""
        if self._reader is None:
            self._reader = VideoStore(self._directory)
            self._places = {episode.name: place for place, episode in enumerate(self._reader)}
        return self._reader.read(self._places[_name(index, camera)])

    def close(self) -> None:
        """See :class:`EpisodeWriter`."""
        self._writer.close()


def _name(index: int, camera: str) -> str:
    return f"{camera}/{index:06d}"


class Journal:
    """``episodes.jsonl``: what is finished, oldest line first; a context manager.

    Raises:
        DiskError: it cannot be written.
        EpisodeError: another process has it open, or a line is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / "episodes.jsonl"
        try:
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise disk_error(self.path, error) from error
        try:
            self._lock()
            content = self.path.read_bytes()
            complete = content[: content.rfind(b"\n") + 1]  # what a killed process left of a line is cut off
            self.entries = self._read(complete)  # by the number of the episode
            self._file.truncate(len(complete))
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise EpisodeError(self.path.parent, "writer", "another process is writing to this folder") from error

    def _read(self, content: bytes) -> dict[int, dict[str, Any]]:
        entries = {}
        for number, line in enumerate(content.splitlines(), 1):
            try:
                entry = json.loads(line)
                entries[int(entry["episode"])] = entry
            except (KeyError, TypeError, ValueError) as error:
                problem = f"is damaged ({line[:60]!r}); without it the episode is made again, so delete the line"
                raise EpisodeError(self.path, f"line {number}", problem) from error
        return entries

    def add(self, index: int, entry: Mapping[str, Any]) -> None:
        """An episode is finished; when this returns that survives a power cut.

        Raises:
            DiskError: the disk is full; the journal is as before.
        """
        entry = {"episode": index, **entry}
        line = (json.dumps(entry) + "\n").encode()
        end = os.fstat(self._file.fileno()).st_size
        try:
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(end)
            raise disk_error(self.path, error) from error
        self.entries[index] = dict(entry)

    def __enter__(self) -> Journal:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self._file.close()

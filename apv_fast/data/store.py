"""A store of videos: raw uint8 frames in a few large files, an index of the episodes, checksums.

A folder with

* ``store.json``: format version, ``height``, ``width``, ``channels``, who made it and with which settings;
* ``frames-00000.bin``, …: the frames of whole episodes one behind the other, about 1 GiB a file; a longer episode has a
  file of its own;
* ``index.jsonl``: a line an episode, appended when its frames are on the disk (:class:`StoredEpisode`).

So an episode is in the index and complete, or absent; frames behind the last indexed one are what a killed writer left,
and the next writer cuts them off. Readers see the episodes in the order of their names, whatever the order of writing.

Frames are read with ``preadv`` into the caller's memory: the operating system's cache gives them the speed of RAM while
RAM is free, and the process itself holds 48 bytes an episode.

Limits: all frames of a store have the same size; one writer at a time; episodes are never changed or removed.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import os
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from apv_fast.atomic_file import disk_error, sync_directory
from apv_fast.data.store_format import (
    INDEX_FILE,
    VERSION,
    StoredEpisode,
    StoreError,
    describe,
    index_lines,
    is_store,
    read_description,
    shard_file,
)

__all__ = ["StoreError", "StoreWriter", "StoredEpisode", "VideoStore", "is_store"]

SHARD_BYTES = 2**30
OPEN_SHARDS = 256  # files that a reader holds open: systems allow 1024


class StoreWriter:
    """Makes a store, or adds to one; a context manager.

    Args:
        directory: the store's folder; made if it does not exist.
        height: of every frame.
        width: of every frame.
        channels: of every frame.
        creator: the program that writes, for example ``apv-fast ingest``.
        settings: what all episodes have in common; must be JSON. A store that exists must have the same.
        shard_bytes: size of a file of frames at which the next one begins.

    Raises:
        StoreError: the folder has a store of another size, creator or settings, or a damaged one, or another process
            is writing there.
        DiskError: it cannot be written.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        height: int = 64,
        width: int = 64,
        channels: int = 3,
        creator: str,
        settings: Mapping[str, Any] | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.directory = Path(directory)
        self.image_shape = (height, width, channels)
        self._shard_bytes = shard_bytes
        description = {"version": VERSION, "height": height, "width": width, "channels": channels, "creator": creator}
        describe(self.directory, {**description, "settings": json.loads(json.dumps(settings or {}))})
        self._names: set[str] = set()
        self._shard = self._end = self._index_bytes = (
            0  # the last shard, where its frames end, and where the index does
        )
        self._frames = -1  # descriptor of the last shard
        self._index = os.open(self.directory / INDEX_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._lock()
            self._recover()
        except BaseException:
            self.close()
            raise

    @property
    def _frame_bytes(self) -> int:
        return int(np.prod(self.image_shape))

    def __contains__(self, name: str) -> bool:
        """Whether the store has an episode of this name."""
        return name in self._names

    def __len__(self) -> int:
        """Episodes in the store."""
        return len(self._names)

    def append(
        self,
        name: str,
        frames: np.ndarray,
        *,
        fps: float | None = None,
        camera: str | None = None,
        quality: str | None = None,
        source: Mapping[str, Any] | None = None,
    ) -> StoredEpisode:
        """Add an episode; when this returns it survives a power cut.

        Args:
            name: must be new.
            frames: uint8 ``[n, height, width, channels]``, n ≥ 1; may be a memory map, which is read in pieces.
            fps: see :class:`StoredEpisode`, as for the others.
            camera: its name.
            quality: of the rendering.
            source: must be JSON.

        Raises:
            StoreError: the name is taken, or the frames are of another type or shape. The store is as before.
            DiskError: the disk is full; the store is as before, and the same call works once there is space.
        """
        if name in self._names:
            raise StoreError(self.directory, "name", f"{name!r} is in the store already")
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != self.image_shape or not len(frames):
            expected = f"must be uint8 [1 or more, {', '.join(map(str, self.image_shape))}]"
            raise StoreError(name, "frames", f"{expected}, not {frames.dtype} {list(frames.shape)}")
        if self._end and self._end + frames.nbytes > self._shard_bytes:
            self._shard, self._end = self._shard + 1, 0
            self._open_shard()
        crc = self._write(frames)
        episode = StoredEpisode(
            name, self._shard, self._end, len(frames), crc, fps, camera, quality, dict(source or {})
        )
        line = (json.dumps(asdict(episode)) + "\n").encode()
        try:
            _write_all(self._index, line, self._index_bytes)
            os.fsync(self._index)
        except OSError as error:
            os.ftruncate(self._index, self._index_bytes)
            raise disk_error(self.directory / INDEX_FILE, error) from error
        self._index_bytes += len(line)
        self._end += frames.nbytes
        self._names.add(name)
        return episode

    def close(self) -> None:
        """Let the next writer in."""
        for descriptor in (self._frames, self._index):
            if descriptor >= 0:
                os.close(descriptor)
        self._frames = self._index = -1

    def __enter__(self) -> StoreWriter:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._index, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreError(self.directory, "writer", "another process is writing to this store") from error

    def _recover(self) -> None:
        """Go behind the last complete episode and remove what a killed writer left there."""
        for start, size, episode in index_lines(self.directory):
            self._names.add(episode.name)
            end = (episode.shard, episode.offset + episode.frames * self._frame_bytes)
            self._shard, self._end = max(end, (self._shard, self._end))
            self._index_bytes = start + size
        os.ftruncate(self._index, self._index_bytes)
        self._open_shard()
        for path in self.directory.glob("frames-*.bin"):
            if path.name > shard_file(self._shard):
                path.unlink()

    def _open_shard(self) -> None:
        """Open the last shard and cut off what is not in the index."""
        if self._frames >= 0:
            os.close(self._frames)
        path = self.directory / shard_file(self._shard)
        self._frames = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        if os.fstat(self._frames).st_size < self._end:
            raise StoreError(path, "size", f"must be at least {self._end} bytes; the file was cut short")
        os.ftruncate(self._frames, self._end)
        sync_directory(self.directory)

    def _write(self, frames: np.ndarray) -> int:
        """Put the frames at the end of the shard; returns their checksum."""
        rows = max(1, 2**23 // self._frame_bytes)
        crc, place = 0, self._end
        try:
            for start in range(0, len(frames), rows):
                piece = np.ascontiguousarray(frames[start : start + rows]).data.cast("B")
                crc = zlib.crc32(piece, crc)
                _write_all(self._frames, piece, place)
                place += len(piece)
            os.fsync(self._frames)
        except OSError as error:
            os.ftruncate(self._frames, self._end)
            raise disk_error(self.directory / shard_file(self._shard), error) from error
        return crc


class VideoStore:
    """Reads a store: the episodes that were in it when it was opened, in the order of their names.

    It can be pickled (a spawned worker opens the files anew and sees the same episodes) and used by several threads.

    Raises:
        StoreError: there is no store, its version is another, or a file is damaged.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.description = read_description(self.directory)
        height, width, channels = (self.description[name] for name in ("height", "width", "channels"))
        self.image_shape: tuple[int, int, int] = (height, width, channels)
        names, flat = [], array.array("q")
        for start, size, one in index_lines(self.directory):
            names.append(one.name)
            flat.extend((start, size, one.shard, one.offset, one.frames, one.crc32))
        order = sorted(range(len(names)), key=names.__getitem__)
        columns = np.array(flat, np.int64).reshape(-1, 6)[order]
        self._line, self._line_bytes, self._shard, self._offset, lengths, self._crc32 = np.ascontiguousarray(columns.T)
        self.lengths: np.ndarray = lengths  # int64 [episodes], frames of each
        self._open: OrderedDict[str, _File] = OrderedDict()
        self._check_sizes()

    def __len__(self) -> int:
        """Episodes."""
        return len(self.lengths)

    def __getitem__(self, episode: int) -> StoredEpisode:
        """What the index says about an episode; read from the disk."""
        line = bytearray(int(self._line_bytes[episode]))
        self._file(INDEX_FILE).read_into(memoryview(line), int(self._line[episode]))
        return StoredEpisode(**json.loads(line))

    def __iter__(self) -> Iterator[StoredEpisode]:
        """Every episode's line."""
        return (self[episode] for episode in range(len(self)))

    def read_into(self, episode: int, start: int, out: np.ndarray) -> None:
        """Fill ``out`` uint8 ``[n, height, width, channels]``, contiguous, with frames ``start`` to ``start + n``.

        Raises:
            ValueError: the episode does not have these frames.
            StoreError: the file has become shorter.
        """
        if start < 0 or start + len(out) > self.lengths[episode]:
            raise ValueError(
                f"episode {episode} has {self.lengths[episode]} frames, not those from {start} to {start + len(out)}"
            )
        if out.dtype != np.uint8 or out.shape[1:] != self.image_shape:
            expected = f"uint8 [n, {', '.join(map(str, self.image_shape))}]"
            raise ValueError(f"out must be {expected}, not {out.dtype} {list(out.shape)}")
        file = self._file(shard_file(int(self._shard[episode])))
        file.read_into(out.data.cast("B"), int(self._offset[episode]) + start * int(np.prod(self.image_shape)))

    def read(self, episode: int, start: int = 0, count: int | None = None) -> np.ndarray:
        """Frames as uint8 ``[count, height, width, channels]``; all from ``start`` on if ``count`` is None."""
        count = int(self.lengths[episode]) - start if count is None else count
        out = np.empty((count, *self.image_shape), np.uint8)
        self.read_into(episode, start, out)
        return out

    def verify(self) -> Iterator[tuple[int, bool]]:
        """Compare every episode's frames with its checksum; gives ``(episode, whether it is as it was written)``."""
        rows = max(1, 2**23 // int(np.prod(self.image_shape)))
        for episode, length in enumerate(self.lengths.tolist()):
            crc = 0
            for start in range(0, length, rows):
                crc = zlib.crc32(self.read(episode, start, min(rows, length - start)).data.cast("B"), crc)
            yield episode, crc == self._crc32[episode]

    def __getstate__(self) -> dict[str, Any]:
        """All but the open files."""
        return self.__dict__ | {"_open": OrderedDict()}

    def _file(self, name: str) -> _File:
        """An open file; of more than ``OPEN_SHARDS``, the one opened first closes when nobody is reading it."""
        file = self._open.get(name)
        if file is None:
            file = self._open[name] = _File(self.directory / name)
            if len(self._open) > OPEN_SHARDS:
                with contextlib.suppress(KeyError):  # another thread was faster
                    self._open.popitem(last=False)
        return file

    def _check_sizes(self) -> None:
        ends = self._offset + self.lengths * int(np.prod(self.image_shape))
        for shard in np.unique(self._shard).tolist():
            path, needed = self.directory / shard_file(shard), int(ends[self._shard == shard].max())
            size = path.stat().st_size if path.is_file() else 0
            if size < needed:
                problem = f"has {size} bytes where the index says at least {needed}; copy the store again"
                raise StoreError(path, "size", problem)


class _File:
    """A descriptor that closes with the last reference to it, so no thread reads from a closed one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read_into(self, view: memoryview, place: int) -> None:
        done = 0
        while done < len(view):
            got = os.preadv(self._descriptor, [view[done:]], place + done)
            if got == 0:
                raise StoreError(self._path, "size", f"ends before byte {place + len(view)}; copy the store again")
            done += got


def _write_all(descriptor: int, data: bytes | memoryview, place: int) -> None:
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], place + done)

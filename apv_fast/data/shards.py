"""Videos as tar files that are read from the beginning to the end, for training on many machines (WebDataset's format).

:func:`write_shards` cuts a store's episodes into chunks, mixes them well, and puts them into ``videos-000000.tar``, …:
a sample is ``NUMBER.frames.npy`` (uint8 ``[n, 64, 64, 3]``) and ``NUMBER.chunk.json`` (:class:`Chunk`).
:class:`VideoStream` reads such files with the webdataset package. Every process of a torchrun job takes its share of
them (by RANK and WORLD_SIZE), every worker of a DataLoader its share of those; each pass is in another order, and a
buffer of sequences mixes further. Memory is bounded by that buffer and one chunk.

Limits: every frame is drawn alike (so long episodes more often than in a store), ends of episodes no more often than
the rest; nothing can be held out; a stream that is resumed begins anew in another order.
"""

from __future__ import annotations

import io
import json
import math
import os
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from apv_fast.atomic_file import atomic_file
from apv_fast.data.corpus import FRAME_SHAPE
from apv_fast.data.episodes import EpisodeError
from apv_fast.data.store import StoreError, VideoStore
from apv_fast.optional import optional

SHARDS_FILE = "shards.json"
BUFFER_BYTES = 2**28  # of sequences that are mixed
_FRAMES, _CHUNK = "frames.npy", "chunk.json"


@dataclass(frozen=True)
class Chunk:
    """What a sample says about its frames."""

    episode: str
    """Name of the episode in the store."""
    start: int
    """Number of the first frame in it."""
    frames: int
    """How many."""
    crc32: int
    """Of their bytes."""


def webdataset() -> ModuleType:
    """The package that reads and writes shards; raises as :func:`apv_fast.optional.optional`."""
    return optional("webdataset", "shards need", "webdataset")


def write_shards(
    store: VideoStore, out: Path, *, chunk_frames: int = 100, shard_bytes: int = 2**28, seed: int = 0
) -> Iterator[tuple[int, int]]:
    """Write a store's episodes into ``out`` as shards; gives how many are done of how many, at first and after each.

    Interrupted at any moment, the same call goes on: a shard is complete or not there.

    Args:
        store: what to write.
        out: folder; made if it does not exist.
        chunk_frames: frames in a sample. Longer episodes are cut into overlapping pieces of exactly this length,
            shorter ones are one piece. A sequence to train on can be at most as long.
        shard_bytes: about how large a file is. Every process that will train needs one at least.
        seed: of the order of the chunks.

    Raises:
        ValueError: a number is too small.
        StoreError: ``out`` has shards of another store or other settings, or the store is damaged.
        DiskError: the disk is full.
    """
    if chunk_frames < 1 or shard_bytes < 1:
        raise ValueError(f"chunk_frames and shard_bytes must be positive, not {chunk_frames} and {shard_bytes}")
    wds = webdataset()
    episode, start = _cut(store.lengths, chunk_frames)
    order = np.random.default_rng(seed).permutation(len(episode))
    per_shard = max(1, shard_bytes // (chunk_frames * math.prod(store.image_shape)))
    shards = -(-len(order) // per_shard)
    _describe(store, out, {"chunk_frames": chunk_frames, "shards": shards, "chunks": len(order), "seed": seed})
    yield 0, shards
    for shard in range(shards):
        path = out / f"videos-{shard:06d}.tar"
        if not path.exists():
            with atomic_file(path) as file, wds.TarWriter(file, encoder=False, mtime=0) as tar:
                for number in order[shard * per_shard : (shard + 1) * per_shard].tolist():
                    tar.write(_sample(store, number, int(episode[number]), int(start[number]), chunk_frames))
        yield shard + 1, shards


class VideoStream:
    """Sequences from shards, endlessly.

    Args:
        pattern: a file, files by number (``videos-{000000..000099}.tar``), or a folder of shards.
        chunk_length: frames in a sequence (T).
        seed: of the order.
        buffer_bytes: memory for the sequences that are mixed.

    Raises:
        EpisodeError: a file is missing, or there are fewer than processes.
        ImportError: webdataset is not installed.
    """

    def __init__(
        self, pattern: Path | str, *, chunk_length: int, seed: int = 0, buffer_bytes: int = BUFFER_BYTES
    ) -> None:
        self.source, self._length, self._seed = str(pattern), chunk_length, seed
        self._buffer = max(1, buffer_bytes // (chunk_length * math.prod(FRAME_SHAPE)))
        self._wds = webdataset()
        self._files = self._expand(Path(pattern))
        self.qualities = _recorded_qualities(self._files[0].parent)
        self.skipped_short = self.skipped_damaged = 0
        self._sequences: Iterator[np.ndarray] = iter(())
        self.restart(0)

    def read_into(self, out: np.ndarray) -> None:
        """Fill ``out``, uint8 ``[T, 64, 64, 3]``, with the next sequence.

        Raises:
            EpisodeError: no file has any.
        """
        sequence = next(self._sequences, None)
        if sequence is None:
            problem = f"none is usable ({self.skipped_damaged} damaged, {self.skipped_short} with fewer than"
            raise EpisodeError(self.source, "chunks", f"{problem} {self._length} frames)")
        np.copyto(out, sequence)

    def restart(self, position: int) -> None:
        """Begin anew, in an order that the seed, the process's rank and ``position`` decide."""
        rank = int(os.environ.get("RANK", "0"))
        words = np.random.SeedSequence([self._seed, rank, position]).generate_state(2)
        shards, mixing = (int(word) for word in words)
        pipeline = self._wds.WebDataset(
            [str(file) for file in self._files],
            nodesplitter=self._wds.split_by_node,
            shardshuffle=len(self._files),
            detshuffle=True,
            seed=shards,
            handler=self._skip,
            empty_check=False,  # its message is about workers; ours says what was skipped
        )
        generator = np.random.default_rng(mixing)
        mix = self._wds.detshuffle(self._buffer, max(1, self._buffer // 4), seed=mixing)
        self._sequences = iter(pipeline.compose(lambda samples: self._cut_sequences(samples, generator), mix).repeat())

    def close(self) -> None:
        """Close the file that is being read."""
        self._sequences = iter(())

    def _expand(self, pattern: Path) -> list[Path]:
        if pattern.is_dir():
            files = sorted(pattern.absolute().glob("*.tar"))
        else:
            files = [Path(name) for name in self._wds.shardlists.expand_urls(str(pattern.absolute()))]
        if missing := [file for file in files if not file.is_file()]:
            raise EpisodeError(self.source, "shards", f"{len(missing)} of {len(files)} are missing, first {missing[0]}")
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if len(files) < processes:
            problem = f"there are {len(files)} for {processes} processes; write smaller ones, every process needs one"
            raise EpisodeError(self.source, "shards", problem)
        return files

    def _cut_sequences(self, samples: Iterator[dict[str, Any]], generator: np.random.Generator) -> Iterator[np.ndarray]:
        """As many sequences of every chunk as fit into it beside each other, from a random frame on."""
        for sample in samples:
            try:
                frames = _frames_of(sample)
            except (ValueError, KeyError, TypeError) as error:  # whatever NumPy and JSON make of damage
                self._skip(ValueError(f"{sample['__url__']}: {sample['__key__']}: {error}"))
                continue
            count = len(frames) // self._length
            self.skipped_short += count == 0
            first = int(generator.integers(len(frames) - count * self._length + 1))
            for start in range(first, first + count * self._length, self._length):
                yield frames[start : start + self._length].copy()  # so that the chunk can go

    def _skip(self, error: Exception) -> bool:
        self.skipped_damaged += 1
        warnings.warn(f"skipped a damaged chunk or shard: {error}", stacklevel=2)
        return True


def _cut(lengths: np.ndarray, chunk_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Episode and first frame of every chunk, int64; those of an episode are evenly spaced."""
    counts = -(-lengths // chunk_frames)
    starts = [
        np.linspace(0, max(length - chunk_frames, 0), count).round().astype(np.int64)
        for length, count in zip(lengths.tolist(), counts.tolist(), strict=True)
    ]
    return np.repeat(np.arange(len(lengths)), counts), np.concatenate([*starts, np.zeros(0, np.int64)])


def _sample(store: VideoStore, number: int, episode: int, start: int, chunk_frames: int) -> dict[str, Any]:
    frames = store.read(episode, start, min(chunk_frames, int(store.lengths[episode]) - start))
    chunk = Chunk(store[episode].name, start, len(frames), zlib.crc32(frames.data))
    array = io.BytesIO()
    np.save(array, frames)
    return {"__key__": f"{number:09d}", _FRAMES: array.getvalue(), _CHUNK: json.dumps(asdict(chunk)).encode()}


def _frames_of(sample: dict[str, Any]) -> np.ndarray:
    """The frames of a sample, checked.

    Raises:
        ValueError, KeyError, TypeError: it is damaged.
    """
    chunk = Chunk(**json.loads(sample[_CHUNK]))
    frames: np.ndarray = np.load(io.BytesIO(sample[_FRAMES]), allow_pickle=False)
    if frames.dtype != np.uint8 or frames.shape != (chunk.frames, *FRAME_SHAPE):
        raise ValueError(f"must be uint8 {[chunk.frames, *FRAME_SHAPE]}, not {frames.dtype} {list(frames.shape)}")
    if zlib.crc32(np.ascontiguousarray(frames).data) != chunk.crc32:
        raise ValueError("its frames are not those that were written (checksum)")
    return frames


def _describe(store: VideoStore, out: Path, settings: dict[str, Any]) -> None:
    """Write ``shards.json``, or see that the one there says the same."""
    qualities = sorted({episode.quality for episode in store if episode.quality})
    about = {"store": store.description, "episodes": len(store), "frames": int(store.lengths.sum())}
    settings = about | {"qualities": qualities} | settings
    path = out / SHARDS_FILE
    if not path.exists():
        if out.exists() and any(out.iterdir()):
            raise StoreError(out, "folder", f"is not empty and has no {SHARDS_FILE}; choose another folder")
        out.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write((json.dumps(settings, indent=2) + "\n").encode())
        return
    before = json.loads(path.read_text())
    for name, now in settings.items():
        if before.get(name) != now:
            problem = f"is {before.get(name)!r} there and {now!r} now; choose another folder"
            raise StoreError(path, name, problem)


def _recorded_qualities(folder: Path) -> set[str]:
    try:
        return set(json.loads((folder / SHARDS_FILE).read_text())["qualities"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()  # only the tar files were copied

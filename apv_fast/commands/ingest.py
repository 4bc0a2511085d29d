"""``apv-fast ingest``: convert videos of any kind to a store, once."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apv_fast.atomic_file import atomic_file, disk_error
from apv_fast.commands.parts.ingest_card import write_ingest_card
from apv_fast.config import ConfigError, IngestConfig
from apv_fast.data.parallel_decoding import Decoded, decode_all
from apv_fast.data.sources import ClipOptions, Source, SourceError, open_source
from apv_fast.data.store import StoreError, StoreWriter, VideoStore
from apv_fast.data.store_format import EPISODE, index_lines
from apv_fast.run import Progress, stop_on_signal

SKIPPED = "skipped.jsonl"
_SCRATCH = "unfinished"
_SHOWN = 5  # skipped sources that the summary names


@dataclass(frozen=True)
class Skipped:
    """A line of ``skipped.jsonl``: a source that gave nothing, or not all of it."""

    name: str
    path: str
    reason: str
    stamp: Mapping[str, int]


def ingest(config: IngestConfig) -> Path:
    """Convert every source that is not in the store yet; returns the store's folder.

    Sources that cannot be read are listed in ``skipped.jsonl`` and not tried again before they change.

    Raises:
        ConfigError: the settings make no sense.
        SourceError: a path has nothing to read, or after all nothing usable is in the store.
        StoreError: the store was made with other settings.
        DiskError: the disk is full; what is finished stays.
        KeyboardInterrupt: the user stopped it; what is finished stays, and the same command goes on.
    """
    check(config)
    options = ClipOptions(config.size, config.aspect, config.fps, config.max_frames, config.camera)
    sources = _find(config.sources, options)
    settings = {name: getattr(config, name) for name in ("aspect", "fps", "max_frames", "min_frames")}
    with StoreWriter(
        config.out, height=config.size, width=config.size, creator="apv-fast ingest", settings=settings
    ) as writer:
        log = _SkippedLog(config.out / SKIPPED)
        waiting = _not_done(sources, config.out, log)
        _say(f"{len(sources)} sources, {len(sources) - len(waiting)} of them done before, into {config.out}")
        left = _convert(waiting, len(sources), config, options, writer, log)
    if left:
        done = len(sources) - left
        raise KeyboardInterrupt(f"stopped at {done} of {len(sources)} sources; the same command goes on")
    store = VideoStore(config.out)
    _summarize(store, [log.entries[one.name] for one in sources if one.name in log.entries], config.out)
    write_ingest_card(config, store, len(log.entries))
    if config.verify:
        _verify(store)
    return config.out


def check(config: IngestConfig) -> None:
    """See that the numbers make sense.

    Raises:
        ConfigError: they do not; names the field.
    """
    if not config.sources:
        raise ConfigError("sources: give at least one file or folder, for example: apv-fast ingest videos --out store")
    for name, least in (("size", 1), ("min_frames", 1), ("workers", 0)):
        if getattr(config, name) < least:
            raise ConfigError(f"{name} is {getattr(config, name)}; it must be at least {least}")
    if config.fps is not None and not 0 < config.fps < 1e6:
        raise ConfigError(f"fps is {config.fps}; it must be positive")
    if config.max_frames is not None and config.max_frames < config.min_frames:
        raise ConfigError(f"max_frames is {config.max_frames}; it must be at least min_frames = {config.min_frames}")


def _find(paths: Iterable[Path], options: ClipOptions) -> list[Source]:
    """The sources in all paths, each with a name of its own."""
    sources: dict[str, Source] = {}
    for path in paths:
        for source in open_source(path, options):
            other = sources.setdefault(source.name, source)
            if other.path.resolve() != source.path.resolve():
                raise ConfigError(
                    f"sources: {other.path} and {source.path} would both be called {source.name}; "
                    "give the folder above them, or make a store of each"
                )
    return list(sources.values())


class _SkippedLog:
    """``skipped.jsonl``; of a source that is in it twice the last line holds."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.entries: dict[str, Skipped] = {}
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        for line in lines:
            if line.endswith(b"\n"):  # else its writer was killed
                entry = Skipped(**json.loads(line))
                self.entries[entry.name] = entry
        if lines and not lines[-1].endswith(b"\n"):
            os.truncate(path, sum(map(len, lines[:-1])))

    def add(self, source: Source, reason: str, stamp: Mapping[str, int]) -> None:
        entry = Skipped(source.name, str(source.path), reason, stamp)
        if self.entries.get(source.name) == entry:
            return
        self.entries[source.name] = entry
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(asdict(entry)) + "\n")
        except OSError as error:
            raise disk_error(self._path, error) from error

    def remove(self, source: Source) -> None:
        """It can be read now."""
        if self.entries.pop(source.name, None):
            with atomic_file(self._path) as file:
                file.writelines((json.dumps(asdict(entry)) + "\n").encode() for entry in self.entries.values())


def _not_done(sources: Sequence[Source], out: Path, log: _SkippedLog) -> list[Source]:
    """The sources that are neither whole in the store nor known to be unusable."""
    stored: dict[str, Mapping[str, Any]] = {}
    clips: Counter[str] = Counter()
    for _, _, episode in index_lines(out):
        stored[episode.source["name"]] = episode.source
        clips[episode.source["name"]] += 1

    def done(source: Source) -> bool:
        before, skipped = stored.get(source.name), log.entries.get(source.name)
        try:
            stamp = source.stamp()
        except OSError:
            return False
        if before is None:
            return skipped is not None and skipped.stamp == stamp
        if any(before[key] != stamp[key] for key in stamp):
            log.add(source, "has changed since it was ingested; the store keeps what it was", stamp)
            return True
        return clips[source.name] == before["clips"]

    return [source for source in sources if not done(source)]


def _convert(
    waiting: Sequence[Source],
    total: int,
    config: IngestConfig,
    options: ClipOptions,
    writer: StoreWriter,
    log: _SkippedLog,
) -> int:
    """Decode and store; returns how many sources are left when the user stopped it."""
    if not waiting:
        return 0
    scratch = config.out / _SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    workers = min(config.workers or len(os.sched_getaffinity(0)), len(waiting))
    done = frames = 0
    begin = time.monotonic()
    try:
        with stop_on_signal() as stop, Progress("ingest", total, start=total - len(waiting), unit="source") as progress:
            results = decode_all(
                waiting,
                options,
                min_frames=config.min_frames,
                workers=workers,
                scratch=scratch,
                stopped=lambda: stop.requested,
            )
            with closing(results):
                for source, decoded in results:
                    _store(writer, source, decoded)
                    if decoded.problem:
                        log.add(source, decoded.problem, decoded.stamp)
                    else:
                        log.remove(source)
                    done += 1
                    frames += sum(piece.frames for piece in decoded.pieces)
                    rate = frames / (time.monotonic() - begin)
                    progress.update(total - len(waiting) + done, f"{rate:.0f} frames/s, {len(log.entries)} skipped")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return len(waiting) - done


def _store(writer: StoreWriter, source: Source, decoded: Decoded) -> None:
    """Move the frames of a source into the store; pieces that a killed command had stored are there already."""
    count = sum(piece.frames for piece in decoded.pieces)
    if count:
        frames = np.memmap(decoded.scratch, np.uint8, "r", shape=(count, *writer.image_shape))
        origin = {"name": source.name, "path": str(source.path.resolve()), "clips": len(decoded.pieces)}
        start = 0
        for piece in decoded.pieces:
            if piece.name not in writer:
                writer.append(
                    piece.name,
                    frames[start : start + piece.frames],
                    fps=piece.fps,
                    camera=piece.camera,
                    quality=piece.quality,
                    source={**origin, **decoded.stamp, **({EPISODE: piece.episode} if piece.episode else {})},
                )
            start += piece.frames
    decoded.scratch.unlink(missing_ok=True)


def _summarize(store: VideoStore, skipped: Sequence[Skipped], out: Path) -> None:
    """Say what there is, and what is not.

    Raises:
        SourceError: there is nothing.
    """
    reasons = [f"  {entry.name}: {entry.reason}" for entry in skipped[:_SHOWN]]
    if len(skipped) > _SHOWN:
        reasons.append(f"  and {len(skipped) - _SHOWN} more")
    if not len(store):
        listed = "\n".join(["nothing could be read:", *reasons])
        raise SourceError(out, "episodes", listed)
    frames = int(store.lengths.sum())
    size = frames * int(np.prod(store.image_shape))
    _say(f"{len(store)} episodes, {frames} frames, {size / 1e9:.3g} GB in {out}")
    if skipped:
        _say("\n".join([f"{len(skipped)} sources skipped, or in part; all are listed in {out / SKIPPED}:", *reasons]))


def _verify(store: VideoStore) -> None:
    damaged = []
    with Progress("verify", len(store), unit="episode") as progress:
        for episode, good in store.verify():
            damaged += [] if good else [store[episode].name]
            progress.update(episode + 1, f"{len(damaged)} damaged")
    if damaged:
        names = ", ".join(damaged[:_SHOWN])
        raise StoreError(store.directory, "checksums", f"{len(damaged)} episodes have changed on the disk: {names}")


def _say(text: str) -> None:
    print(text, file=sys.stderr)

"""Many sources decoded at once, each by one of several processes, whatever is wrong with them.

A worker writes the frames of one source to a scratch file and tells which clips they are; the caller moves them to
where they belong. A source that breaks its process (decoders meet strange files) costs a restart and is reported like
any other that cannot be read: when a pool breaks, what was in it is tried again one by one, which finds the culprit.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import multiprocessing.connection
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import BinaryIO

from apv_fast.atomic_file import DiskError, disk_error
from apv_fast.data.sources import Clip, ClipOptions, Source
from apv_fast.worker import begin_worker, interrupt_held

_Job = tuple[Source, Path]  # what to read, and the scratch file for it


@dataclass(frozen=True)
class Piece:
    """A complete clip in a scratch file; they lie one behind the other, from its beginning."""

    name: str
    frames: int
    fps: float | None
    camera: str | None
    quality: str | None
    episode: str | None


@dataclass
class Decoded:
    """What became of a source."""

    scratch: Path
    """Raw frames of the pieces."""
    stamp: dict[str, int] = field(default_factory=dict)
    """Of the source, before it was read."""
    pieces: list[Piece] = field(default_factory=list)
    """Clips, also those before a damaged place."""
    problem: str = ""
    """Why there are no others, or no more."""


class Stopped(Exception):
    """A worker was asked to stop in the middle of a source."""


def decode_all(
    sources: Sequence[Source],
    options: ClipOptions,
    *,
    min_frames: int,
    workers: int,
    scratch: Path,
    stopped: Callable[[], bool],
) -> Generator[tuple[Source, Decoded], None, None]:
    """Decode every source; results come as they are ready, in no particular order.

    Args:
        sources: what to decode.
        options: see there.
        min_frames: shorter clips are left out.
        workers: processes.
        scratch: folder for scratch files; who takes a result removes its file.
        stopped: looked at now and then; when it gives true, what is being decoded is given up, and the iterator ends.

    Raises:
        DiskError: a scratch file could not be written.
    """

    def pool(jobs: deque[_Job], workers: int) -> Generator[tuple[Source, Decoded], None, list[_Job]]:
        return _pool(jobs, options, min_frames, workers, stopped)

    waiting = deque((source, scratch / f"{number}.raw") for number, source in enumerate(sources))
    while waiting and not stopped():
        for suspect in (yield from pool(waiting, workers)):
            if (yield from pool(deque([suspect]), 1)) and not stopped():
                source, file = suspect
                yield source, Decoded(file, source.stamp(), problem="its reader crashed")


def decode(source: Source, file: Path, options: ClipOptions, min_frames: int, stop: Event | None = None) -> Decoded:
    """Decode one source into a scratch file; that a source cannot be read is a result, not an error.

    Raises:
        Stopped: ``stop`` was set.
        DiskError: the file could not be written.
    """
    result = Decoded(file)
    too_short = ""
    try:
        result.stamp = source.stamp()
        with _open_scratch(file) as out:
            for clip in source.clips(options):
                begin = out.tell()
                count = _write(clip, out, stop)
                if count >= min_frames:
                    result.pieces.append(Piece(clip.name, count, clip.fps, clip.camera, clip.quality, clip.episode))
                else:
                    out.seek(begin)
                    too_short = f"too short: {count} frames, where {min_frames} are needed"
    except (DiskError, Stopped):
        raise
    except Exception as error:  # readers raise whatever damage makes them meet
        text = str(error).removeprefix(f"{source.path}: ")
        result.problem = text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"
    else:
        result.problem = "" if result.pieces else too_short or "has no videos"
    return result


def _pool(
    waiting: deque[_Job], options: ClipOptions, min_frames: int, workers: int, stopped: Callable[[], bool]
) -> Generator[tuple[Source, Decoded], None, list[_Job]]:
    """Decode until nothing is waiting, or a worker dies: then returns what was with the workers."""
    # Workers are forks of a process that did nothing but import this module: a fork of this one would copy locks that
    # threads hold, and in a fresh process importing torch takes seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    give_up = context.Event()
    running: dict[concurrent.futures.Future[Decoded], _Job] = {}
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _begin_worker, (give_up,))
    try:
        while (waiting or running) and not stopped():
            while waiting and len(running) <= workers:  # one more, for whoever is free first
                with interrupt_held():
                    running[pool.submit(_work, *waiting[0], options, min_frames)] = waiting[0]
                waiting.popleft()
            done, _ = concurrent.futures.wait(running, 0.2, concurrent.futures.FIRST_COMPLETED)
            for future in done:
                result = future.result()
                source, _ = running.pop(future)
                yield source, result
    except BrokenProcessPool:
        return list(running.values())
    finally:
        give_up.set()
        pool.shutdown(cancel_futures=True)
    return []


_give_up: Event | None = None  # of a worker


def _begin_worker(give_up: Event) -> None:
    global _give_up
    _give_up = give_up
    begin_worker()


def _work(source: Source, file: Path, options: ClipOptions, min_frames: int) -> Decoded:
    return decode(source, file, options, min_frames, _give_up)


def _open_scratch(path: Path) -> BinaryIO:
    try:
        return path.open("wb", buffering=0)
    except OSError as error:
        raise disk_error(path, error) from error


def _write(clip: Clip, file: BinaryIO, stop: Event | None) -> int:
    """Frames written."""
    count = 0
    for frame in clip.frames:
        if stop is not None and stop.is_set():
            raise Stopped
        view = memoryview(frame.tobytes())
        try:
            while view:
                view = view[file.write(view) :]
        except OSError as error:
            raise disk_error(Path(file.name), error) from error
        count += 1
    return count

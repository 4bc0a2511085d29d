"""LeRobot datasets, format v3: tables in Parquet, and MP4 files with many episodes each, or pictures in the tables."""

from __future__ import annotations

import io
import itertools
import json
import operator
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from apv_fast.data.sources.clip import Clip, ClipOptions, Source, SourceError, cut, resample, resize
from apv_fast.data.sources.video import Decoder
from apv_fast.optional import optional

INFO = Path("meta/info.json")
_Frame = TypeVar("_Frame")


@dataclass(frozen=True)
class Episode:
    """Where an episode is in a video file."""

    index: int
    begin_s: float
    end_s: float
    frames: int


@dataclass(frozen=True)
class LeRobotVideo(Source):
    """A video file with several episodes."""

    dataset: str
    camera: str
    fps: float
    episodes: tuple[Episode, ...] = field(repr=False)

    def clips(self, options: ClipOptions) -> Iterator[Clip]:
        """See :class:`Source`."""
        half = 0.5 / self.fps
        with Decoder(self.path) as decoder:
            timed = _Ahead(decoder.timed())
            for episode in self.episodes:
                for _ in timed.until(episode.begin_s - half):
                    pass
                own = self._counted(timed.until(episode.end_s - half), episode)
                clip = _clip(self, episode.index, decoder.frames(own, options), options)
                yield from cut(clip, options.max_frames)

    def _counted(self, timed: Iterator[tuple[float, _Frame]], episode: Episode) -> Iterator[tuple[float, _Frame]]:
        count = 0
        for count, item in enumerate(timed, 1):  # noqa: B007  (used after the loop)
            yield item
        if abs(count - episode.frames) > 1:  # the times of episodes are sums, and round
            problem = f"has {count} frames in the video and {episode.frames} in meta/episodes"
            raise SourceError(self.path, f"episode {episode.index}", problem)


@dataclass(frozen=True)
class LeRobotPictures(Source):
    """A Parquet file with compressed pictures."""

    dataset: str
    camera: str
    fps: float

    def clips(self, options: ClipOptions) -> Iterator[Clip]:
        """See :class:`Source`."""
        for index, rows in itertools.groupby(self._rows(), key=operator.itemgetter(0)):
            timed = ((number / self.fps, picture) for number, (_, picture) in enumerate(rows))
            chosen = resample(timed, options.fps, 1 / self.fps) if options.fps else (one for _, one in timed)
            clip = _clip(self, index, (_decode(one, options) for one in chosen), options)
            yield from cut(clip, options.max_frames)

    def _rows(self) -> Iterator[tuple[int, bytes]]:
        """Episode and compressed picture of every frame."""
        with parquet().ParquetFile(self.path) as file:
            for batch in file.iter_batches(batch_size=64, columns=["episode_index", self.camera]):
                for row in batch.to_pylist():
                    if row[self.camera] is None or row[self.camera].get("bytes") is None:
                        raise SourceError(self.path, self.camera, "a picture is not in the file")
                    yield row["episode_index"], row[self.camera]["bytes"]


class _Ahead:
    """Frames with their times, with one of them looked at before it is taken."""

    def __init__(self, timed: Iterator[tuple[float, Any]]) -> None:
        self._timed = timed
        self._next: tuple[float, Any] | None = None

    def until(self, time: float) -> Iterator[tuple[float, Any]]:
        """The frames before ``time``."""
        while True:
            self._next = self._next or next(self._timed, None)
            if self._next is None or self._next[0] >= time:
                return
            taken, self._next = self._next, None
            yield taken


def open_lerobot(root: Path, name: str, options: ClipOptions) -> list[Source]:
    """The files with one camera's episodes.

    Raises:
        SourceError: the dataset is of another version or damaged, or has several cameras and none was chosen.
        ImportError: pyarrow is not installed.
    """
    try:
        info = json.loads((root / INFO).read_text())
        version, fps = str(info["codebase_version"]), float(info["fps"])
        kinds = {key: one["dtype"] for key, one in info["features"].items() if one["dtype"] in ("video", "image")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"is not that of a LeRobot dataset ({type(error).__name__}: {error})"
        raise SourceError(root / INFO, "content", problem) from error
    if not version.startswith("v3."):
        problem = f"must be v3, not {version}; convert it with lerobot, or ingest its videos/ folder by itself"
        raise SourceError(root / INFO, "codebase_version", problem)
    camera = _choose_camera(root, kinds, options.camera)
    table = _episodes(root)
    kind = "videos/" + camera if kinds[camera] == "video" else "data"
    template = info["video_path" if kinds[camera] == "video" else "data_path"]
    files: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    try:
        for row in table:
            files[row[f"{kind}/chunk_index"], row[f"{kind}/file_index"]].append(row)
        return [
            _source(
                root / template.format(video_key=camera, chunk_index=c, file_index=f), name, camera, fps, kind, rows
            )
            for (c, f), rows in sorted(files.items())
        ]
    except KeyError as error:
        raise SourceError(root / "meta/episodes", "columns", f"{error} is missing") from error


def parquet() -> Any:
    """The module that reads Parquet; raises as :func:`apv_fast.optional.optional`."""
    return optional("pyarrow.parquet", "LeRobot datasets need", "lerobot")


def _choose_camera(root: Path, kinds: dict[str, str], camera: str | None) -> str:
    matches = [key for key in kinds if camera is None or camera == key or key.endswith("." + camera)]
    if len(matches) != 1:
        there = ", ".join(kinds) or "none"
        problem = f"{camera!r} is not one of those" if camera else "choose one of several with apv-fast ingest --camera"
        raise SourceError(root, "camera", f"{problem if kinds else 'there is no video'}; the cameras are: {there}")
    return matches[0]


def _episodes(root: Path) -> list[dict[str, Any]]:
    """The rows of ``meta/episodes``, without statistics."""
    rows: list[dict[str, Any]] = []
    for path in sorted((root / "meta/episodes").rglob("*.parquet")):
        try:
            with parquet().ParquetFile(path) as file:
                columns = [one for one in file.schema_arrow.names if one.startswith(("episode_index", "length"))]
                columns += [one for one in file.schema_arrow.names if one.startswith(("videos/", "data/"))]
                rows += file.read(columns).to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            raise SourceError(path, "table", f"cannot be read ({type(error).__name__}: {error})") from error
    if not rows:
        raise SourceError(root / "meta/episodes", "tables", "there are none")
    return rows


def _source(path: Path, name: str, camera: str, fps: float, kind: str, rows: list[dict[str, Any]]) -> Source:
    own = f"{name}/{camera}/{path.parent.name}/{path.name}"
    if kind == "data":
        return LeRobotPictures(own, path, name, camera, fps)
    episodes = [
        Episode(row["episode_index"], row[f"{kind}/from_timestamp"], row[f"{kind}/to_timestamp"], row["length"])
        for row in rows
    ]
    return LeRobotVideo(own, path, name, camera, fps, tuple(sorted(episodes, key=lambda one: one.begin_s)))


def _clip(
    source: LeRobotVideo | LeRobotPictures, index: int, frames: Iterator[np.ndarray], options: ClipOptions
) -> Clip:
    name = f"episode_{index:06d}"
    episode = f"{source.dataset}/{name}"
    fps = options.fps or source.fps
    return Clip(f"{source.dataset}/{source.camera}/{name}", frames, fps, source.camera, episode=episode)


def _decode(data: bytes, options: ClipOptions) -> np.ndarray:
    return resize(Image.open(io.BytesIO(data)).convert("RGB"), options)

"""What every reader of videos gives: clips, whose frames are read one by one, and what has to be done to them."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from PIL import Image

from apv_fast.data.episodes import EpisodeError
from apv_fast.data.video_metadata import video_metadata

Aspect = Literal["crop", "pad", "stretch"]
MAX_GAP_S = 600.0  # a longer pause between two frames is a damaged clock, not a video
_Frame = TypeVar("_Frame")


class SourceError(EpisodeError):
    """A file is damaged or not what a reader can use; the message names it, and what is the matter."""


@dataclass(frozen=True)
class ClipOptions:
    """What is done to every clip."""

    size: int = 64
    """Height and width of the frames that come out."""
    aspect: Aspect = "crop"
    """Of frames that are not square: crop to the middle square, pad with black, or stretch."""
    fps: float | None = None
    """Frames a second that come out; None takes every frame. Sources that know no time are taken as they are."""
    max_frames: int | None = None
    """Longer videos are cut into clips of this many frames."""
    camera: str | None = None
    """Which camera, where a source has several."""


@dataclass
class Clip:
    """A video, or a part of one. Its frames are read once, in order, before the next clip of the same source."""

    name: str
    frames: Iterator[np.ndarray]  # uint8 [size, size, 3]
    fps: float | None = None
    camera: str | None = None
    quality: str | None = None
    episode: str | None = None
    """The same for several views of one episode, else None."""

    @classmethod
    def of_file(cls, source: Source, frames: Iterator[np.ndarray], fps: float | None) -> Clip:
        """The video of a file, with what ``apv-fast collect`` tells of it if that made it."""
        known = video_metadata(source.path)
        folder = source.name.rpartition("/")[0]
        return cls(source.name, frames, fps, known.view, known.quality, known.episode and f"{folder}/{known.episode}")


@dataclass(frozen=True)
class Source(ABC):
    """What is read in one go: a file, or a folder of frames. It can be pickled."""

    name: str
    """Unique among what is ingested together, as are the names of all the clips."""
    path: Path

    def stamp(self) -> dict[str, int]:
        """``bytes`` and ``mtime_ns``: they change when somebody changes the source.

        Raises:
            OSError: it has gone.
        """
        status = self.path.stat()
        return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}

    @abstractmethod
    def clips(self, options: ClipOptions) -> Iterator[Clip]:
        """The clips in it, read as they are asked for.

        Raises:
            SourceError: it is damaged or cannot be used; clips that came before are whole. Iterating over a clip's
                frames raises it too. Decoders may raise other exceptions, which mean the same.
        """


def cut(clip: Clip, max_frames: int | None) -> Iterator[Clip]:
    """``clip`` itself, or pieces ``name#00000``, … of ``max_frames`` frames, of which the last may be shorter."""
    if max_frames is None:
        yield clip
        return
    for number in itertools.count():
        first = next(clip.frames, None)
        if first is None:
            return
        frames = itertools.chain([first], itertools.islice(clip.frames, max_frames - 1))
        part, episode = f"#{number:05d}", clip.episode
        yield replace(clip, name=clip.name + part, frames=frames, episode=episode and episode + part)


def resample(timed: Iterable[tuple[float, _Frame]], fps: float, last_s: float) -> Iterator[_Frame]:
    """Frames at ``fps``, each the one that was on the screen at that time.

    Args:
        timed: time in seconds and frame, in the order of time.
        fps: frames a second to give.
        last_s: how long the last frame is shown.

    Raises:
        SourceError: the clock jumps.
    """
    emitted, begin, now = 0, None, 0.0
    shown: list[_Frame] = []  # at most one
    for time, frame in timed:
        begin = time if begin is None else begin
        if abs(time - begin - now) > MAX_GAP_S:
            raise SourceError("video", "time", f"jumps from {now:.0f} to {time - begin:.0f} s")
        now = time - begin
        while shown and emitted / fps < now - 1e-6:
            yield shown[0]
            emitted += 1
        shown = [frame]
    while shown and emitted / fps < now + last_s - 1e-6:
        yield shown[0]
        emitted += 1


@dataclass(frozen=True)
class Fit:
    """How a picture of any size becomes a square one: scale to ``width`` × ``height``, then :meth:`place`."""

    size: int
    width: int
    height: int

    @classmethod
    def of(cls, width: float, height: float, options: ClipOptions) -> Fit:
        """For pictures that are shown ``width`` × ``height`` large."""
        size = options.size
        if options.aspect == "stretch":
            return cls(size, size, size)
        scale = size / (min(width, height) if options.aspect == "crop" else max(width, height))
        return cls(size, max(1, round(width * scale)), max(1, round(height * scale)))

    def place(self, image: np.ndarray) -> np.ndarray:
        """The middle of the scaled image uint8 ``[height, width, 3]``, with black where there is nothing."""
        top, left = (self.height - self.size) // 2, (self.width - self.size) // 2
        image = image[max(top, 0) : max(top, 0) + self.size, max(left, 0) : max(left, 0) + self.size]
        if image.shape[:2] == (self.size, self.size):
            return image
        square = np.zeros((self.size, self.size, 3), np.uint8)
        top, left = max(-top, 0), max(-left, 0)
        square[top : top + image.shape[0], left : left + image.shape[1]] = image
        return square


def resize(image: np.ndarray | Image.Image, options: ClipOptions) -> np.ndarray:
    """A picture, uint8 ``[height, width, 3]`` or an RGB image, as uint8 ``[size, size, 3]``.

    Pillow's box filter: the exact mean over the area of each new pixel (enlarged pictures are interpolated). One of
    the right size is not touched.
    """
    if isinstance(image, np.ndarray):
        if image.shape == (options.size, options.size, 3):
            return image
        image = Image.fromarray(image)
    fit = Fit.of(image.width, image.height, options)
    shrinks = fit.width <= image.width and fit.height <= image.height
    filter_ = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
    return fit.place(np.asarray(image.resize((fit.width, fit.height), filter_)))

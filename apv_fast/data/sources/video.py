"""Video files, decoded by FFmpeg (PyAV).

A frame goes from the decoder's YUV to small RGB in one pass of swscale with the area filter and full chroma; on 720p
that takes half the time of converting to RGB and shrinking with Pillow and comes as close to the exact mean over areas.
Frames are scaled whole and cropped after, so the width before the crop is a whole number of pixels: an error of
proportion below 1 %. Honoured: rotation (phones), pixels that are not square, variable frame rates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from apv_fast.data.sources.clip import Clip, ClipOptions, Fit, Source, SourceError, cut, resample

EXTENSIONS = frozenset(
    (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".gif", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv", ".3gp")
)
_FILTER = int(Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT)
_DEFAULT_RATE = 25.0  # of a file that does not say


@dataclass(frozen=True)
class VideoFile(Source):
    """One file, one video."""

    def clips(self, options: ClipOptions) -> Iterator[Clip]:
        """See :class:`Source`."""
        with Decoder(self.path) as decoder:
            frames = decoder.frames(decoder.timed(), options)
            yield from cut(Clip.of_file(self, frames, options.fps or decoder.rate), options.max_frames)


class Decoder:
    """The first video stream of a file; a context manager.

    Raises:
        SourceError: the file cannot be opened, or has no video.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._container = av.open(str(path), metadata_errors="replace")  # titles may be in any code
        except (av.FFmpegError, ValueError) as error:
            raise SourceError(path, "video", f"cannot be opened ({_reason(error)})") from error
        stream = self._container.streams.best("video")
        if not isinstance(stream, av.VideoStream) or stream.codec_context is None:
            self._container.close()
            problem = "there is none in the file" if stream is None else "is in a code that this FFmpeg does not know"
            raise SourceError(path, "video", problem)
        self._stream = stream
        stream.codec_context.thread_count = 1  # other processes decode other files
        self.rate = float(stream.average_rate or stream.guessed_rate or _DEFAULT_RATE)

    def timed(self) -> Iterator[tuple[float, av.VideoFrame]]:
        """Every frame with its time in seconds.

        Raises:
            SourceError: the file is damaged, or ends long before it should.
        """
        first, time, count = None, 0.0, 0
        try:
            for frame in self._container.decode(self._stream):
                if frame.is_corrupt:
                    raise SourceError(self._path, "video", f"frame {count} is damaged")
                time = count / self.rate if frame.time is None else frame.time
                first = time if first is None else first
                yield time, frame
                count += 1
        except av.FFmpegError as error:
            raise SourceError(self._path, "video", f"breaks off after {count} frames ({_reason(error)})") from error
        if first is None:
            raise SourceError(self._path, "video", "has no frames")
        covered, promised = time - first + 1 / self.rate, self._duration()
        if promised - covered > max(0.1 * promised, 2 / self.rate):
            raise SourceError(self._path, "video", f"breaks off after {covered:.2f} of {promised:.2f} s")
        if self._container.format.name == "gif" and not self._path.read_bytes().rstrip(b"\0").endswith(b";"):
            raise SourceError(self._path, "video", f"breaks off after {count} frames")

    def frames(self, timed: Iterator[tuple[float, av.VideoFrame]], options: ClipOptions) -> Iterator[np.ndarray]:
        """The frames as uint8 ``[size, size, 3]``, at the rate asked for."""
        chosen = resample(timed, options.fps, 1 / self.rate) if options.fps else (frame for _, frame in timed)
        reformatter = VideoReformatter()
        last, image = None, np.empty(0)
        for frame in chosen:
            if frame is not last:
                last, image = frame, self._convert(frame, reformatter, options)
            yield image

    def __enter__(self) -> Decoder:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._container.close()

    def _convert(self, frame: av.VideoFrame, reformatter: VideoReformatter, options: ClipOptions) -> np.ndarray:
        fit = Fit.of(frame.width * self._pixel_aspect(), frame.height, options)
        small = reformatter.reformat(frame, fit.width, fit.height, "rgb24", interpolation=_FILTER)
        # A quarter turn of the square is that of the picture.
        return np.ascontiguousarray(np.rot90(fit.place(small.to_ndarray()), round(frame.rotation / 90)))

    def _pixel_aspect(self) -> float:
        """Width of a pixel by its height."""
        aspect = self._stream.codec_context.sample_aspect_ratio
        return float(aspect) if aspect and 0.1 < aspect < 10 else 1.0

    def _duration(self) -> float:
        """Seconds that the video should last, as far as the file says; else 0."""
        if self._stream.duration and self._stream.time_base:
            return float(self._stream.duration * self._stream.time_base)
        if self._container.duration and len(self._container.streams) == 1:
            return self._container.duration / av.time_base
        return 0.0


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"

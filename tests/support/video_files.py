"""Small video files for tests, made with PyAV; frames whose content says which they are."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

CODECS = {".mp4": "libx264", ".mov": "libx264", ".mkv": "libx264", ".avi": "mpeg4", ".webm": "libvpx", ".gif": "gif"}
LEVELS = 24  # a frame's grey is one of so many, far enough apart to survive compression


def grey(number: int) -> int:
    """Of frame ``number``."""
    return 10 + 10 * (number % LEVELS)


def numbers(frames: Sequence[np.ndarray]) -> list[int]:
    """Which frames these are, from the grey at their middle."""
    return [round((float(np.mean(frame[24:40, 24:40])) - 10) / 10) for frame in frames]


def plain(count: int, width: int = 96, height: int = 80, first: int = 0) -> list[np.ndarray]:
    """Grey frames."""
    return [np.full((height, width, 3), grey(first + number), np.uint8) for number in range(count)]


def corners(width: int, height: int) -> np.ndarray:
    """A picture whose corners differ: red and green above, blue and white below."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2, 0] = image[: height // 2, width // 2 :, 1] = 255
    image[height // 2 :, : width // 2, 2] = image[height // 2 :, width // 2 :] = 255
    image[height // 2 :, : width // 2, :2] = 0
    return image


def write_video(
    path: Path,
    frames: Sequence[np.ndarray],
    *,
    codec: str | None = None,
    fps: int = 10,
    times: Sequence[int] | None = None,
    pixel_aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """A file in the format that its name says.

    Args:
        path: where.
        frames: uint8 ``[height, width, 3]`` each.
        codec: encoder; default: the usual one of the format.
        fps: frames a second.
        times: of each frame in units of 1/fps; default: 0, 1, 2, …
        pixel_aspect: width of a pixel by its height.
        options: of the container.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options or {}) as container:
        codec = codec or CODECS[path.suffix]
        height, width, _ = frames[0].shape
        stream = container.add_stream(codec, rate=fps)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = width, height
        stream.pix_fmt = {"gif": "rgb8", "libx264": "yuv444p" if width % 2 or height % 2 else "yuv420p"}.get(
            codec, "yuv420p"
        )
        stream.codec_context.time_base = Fraction(1, fps)
        if pixel_aspect:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = times[number] if times else number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def turn(path: Path, quarter: int) -> None:
    """Write into an MP4 that it is to be shown turned clockwise by ``quarter`` quarter turns, as phones do."""
    matrices = {1: (0, 1, -1, 0), 2: (-1, 0, 0, -1), 3: (0, -1, 1, 0)}
    a, b, c, d = (value << 16 for value in matrices[quarter])
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 4 + 20 + 16  # type, version and flags, times and length, layer and volume
    data[matrix : matrix + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)

"""Frames as MP4 files and one frame back, through PyAV.

Lossless H.264 in 4:4:4: what is lost is the rounding between RGB and YUV, at most 2 of 255 levels; rendered frames of
64×64 take a fifth to a seventh of their raw size (walker and quadruped, measured). Half that size would cost errors of
30 levels at edges. Browsers and PyAV play it, some hardware players do not. One thread: the same frames give the same
file.
"""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import numpy as np

from apv_fast.atomic_file import atomic_file

QUALITY = 0  # crf: 0 is lossless, 51 the worst


def write_mp4(path: Path, frames: np.ndarray, *, fps: float) -> Path:
    """Write uint8 ``[T, height, width, 3]``; the file is complete or absent.

    Raises:
        ValueError: the frames have another type or shape, or there are none.
        DiskError: the disk is full.
    """
    import av

    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) == 0:
        raise ValueError(f"frames must be uint8 [T, height, width, 3], not {frames.dtype} {list(frames.shape)}")
    packed = io.BytesIO()
    with av.open(packed, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        stream.options = {"crf": str(QUALITY)}
        stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(packed.getbuffer())
    return path


def read_mp4(path: Path) -> np.ndarray:
    """All frames of a short video, uint8 ``[T, height, width, 3]``."""
    import av

    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])

"""What the tests of the readers of videos share."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from apv_fast.data.sources import Clip, ClipOptions, Source, open_source


def read(path: Path, **options: Any) -> dict[str, list[np.ndarray]]:
    """The frames of every clip in ``path``."""
    chosen = ClipOptions(**options)
    found: dict[str, list[np.ndarray]] = {}
    for source in open_source(path, chosen):
        for clip in pickle.loads(pickle.dumps(source)).clips(chosen):
            assert clip.name not in found
            found[clip.name] = list(clip.frames)
            for frame in found[clip.name]:
                assert frame.dtype == np.uint8 and frame.shape == (chosen.size, chosen.size, 3)
    return found


def first_clip(path: Path, **options: Any) -> Clip:
    """Without its frames."""
    (source,) = open_source(path, ClipOptions(**options))
    return next(source.clips(ClipOptions(**options)))


def quarters(frame: np.ndarray) -> list[str]:
    """Colours of the four corners of a picture made by ``corners``, row by row."""
    names = {"100": "red", "010": "green", "001": "blue", "111": "white", "000": "black"}
    low, high = len(frame) // 4, 3 * len(frame) // 4
    picked = [frame[y, x] for y in (low, high) for x in (low, high)]
    assert all(value < 60 or value > 195 for pixel in picked for value in pixel)
    return [names["".join(str(int(value > 128)) for value in pixel)] for pixel in picked]


def first_clip_of(source: Source) -> Clip:
    return next(source.clips(ClipOptions()))


def write_frames(folder: Path, frames: list[np.ndarray], suffix: str = ".png") -> Path:
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{number}{suffix}")
    return folder

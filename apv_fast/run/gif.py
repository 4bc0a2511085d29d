"""Animated pictures: GIF files from frames, and the open-loop report."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from apv_fast.atomic_file import atomic_file


def open_loop_grid(truth: np.ndarray, model: np.ndarray) -> np.ndarray:
    """Truth, model and error above each other, the sequences side by side, as the official report shows them.

    Args:
        truth: uint8 ``[B, T, height, width, 3]``.
        model: the same shape: reconstructions of the context frames, then what the model imagined.

    Returns:
        uint8 ``[T, 3·height, B·width, 3]``. Error is (model − truth + 1)/2 in [0, 1]: grey where both agree.
    """
    for name, value in (("truth", truth), ("model", model)):
        if value.dtype != np.uint8 or value.ndim != 5 or value.shape != truth.shape:
            raise ValueError(f"{name} must be uint8 [B, T, height, width, 3], not {value.dtype} {list(value.shape)}")
    error = ((model.astype(np.int16) - truth + 255) // 2).astype(np.uint8)
    rows = np.concatenate([truth, model, error], axis=2)  # [B, T, 3·height, width, 3]
    batch, length, height, width, channels = rows.shape
    grid: np.ndarray = rows.transpose(1, 2, 0, 3, 4).reshape(length, height, batch * width, channels)
    return grid


def encode_gif(file: BinaryIO, frames: np.ndarray, *, fps: float = 15, scale: int = 1) -> None:
    """Write uint8 ``[T, height, width, 3]`` as an endless GIF, every pixel ``scale`` × ``scale`` large.

    Raises:
        ValueError: the frames have another type or shape, or there are none.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) == 0:
        raise ValueError(f"frames must be uint8 [T, height, width, 3], not {frames.dtype} {list(frames.shape)}")
    if fps <= 0 or scale < 1:
        raise ValueError(f"fps must be positive and scale at least 1, not {fps} and {scale}")
    size = frames.shape[2] * scale, frames.shape[1] * scale
    small = [Image.fromarray(frame).quantize(dither=Image.Dither.NONE) for frame in frames]  # slow: before enlarging
    images = [image.resize(size, Image.Resampling.NEAREST) for image in small]
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)


def write_gif(path: Path, frames: np.ndarray, *, fps: float = 15, scale: int = 1) -> Path:
    """:func:`encode_gif` to a file, complete or absent; its folder is made if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        encode_gif(file, frames, fps=fps, scale=scale)
    return path

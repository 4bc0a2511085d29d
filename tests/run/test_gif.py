"""Videos of a run: grids and GIFs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from apv_fast.run import (
    open_loop_grid,
    write_gif,
)


def test_open_loop_grid_stacks_truth_model_and_error() -> None:
    generator = np.random.default_rng(0)
    truth, model = generator.integers(0, 256, (2, 6, 5, 4, 4, 3), dtype=np.uint8)
    grid = open_loop_grid(truth, model)
    assert grid.dtype == np.uint8
    assert grid.shape == (5, 12, 24, 3)
    for b in range(6):
        column = grid[:, :, 4 * b : 4 * b + 4]
        np.testing.assert_array_equal(column[:, :4], truth[b])
        np.testing.assert_array_equal(column[:, 4:8], model[b])
        error = (model[b].astype(float) - truth[b] + 255) / 2
        np.testing.assert_array_less(np.abs(column[:, 8:] - error), 0.51)
    assert (open_loop_grid(truth, truth)[:, 8:] == 127).all(), "grey where both agree"


def test_gif_shows_the_frames(tmp_path: Path) -> None:
    frames = np.zeros((3, 4, 5, 3), np.uint8)
    frames[0, :, :, 0], frames[1, :2, :, 1], frames[2, :, 2:, 2] = 250, 240, 230
    path = write_gif(tmp_path / "videos" / "a.gif", frames, fps=10, scale=2)
    with Image.open(path) as image:
        assert (image.n_frames, image.size, image.info["duration"]) == (3, (10, 8), 100)  # type: ignore[attr-defined]
        for index, frame in enumerate(frames):
            image.seek(index)
            shown = np.asarray(image.convert("RGB"))
            np.testing.assert_array_equal(shown[::2, ::2], frame)
            np.testing.assert_array_equal(shown[1::2, 1::2], frame)


@pytest.mark.parametrize(
    ("frames", "options", "message"),
    [
        (np.zeros((3, 4, 5, 3), np.float32), {}, "frames must be uint8"),
        (np.zeros((0, 4, 5, 3), np.uint8), {}, "frames must be uint8"),
        (np.zeros((3, 4, 5), np.uint8), {}, "frames must be uint8"),
        (np.zeros((3, 4, 5, 3), np.uint8), {"scale": 0}, "scale at least 1"),
        (np.zeros((3, 4, 5, 3), np.uint8), {"fps": 0}, "fps must be positive"),
    ],
)
def test_bad_videos(tmp_path: Path, frames: np.ndarray, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_gif(tmp_path / "a.gif", frames, **options)
    assert list(tmp_path.iterdir()) == []


def test_bad_grids() -> None:
    good = np.zeros((1, 2, 4, 4, 3), np.uint8)
    with pytest.raises(
        ValueError, match=r"model must be uint8 \[B, T, height, width, 3\], not uint8 \[1, 1, 4, 4, 3\]"
    ):
        open_loop_grid(good, good[:, :1])
    with pytest.raises(ValueError, match="truth must be uint8"):
        open_loop_grid(good[0], good[0])

"""Cards of data sets, and videos as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from apv_fast.data.dataset_card import contact_sheet, write_card
from apv_fast.data.mp4 import read_mp4, write_mp4


def _frames(count: int, height: int = 64, width: int = 64) -> np.ndarray:
    """Frame i is full of i."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, height, width, 3)).copy()


@pytest.mark.parametrize(
    ("frames", "shape"),
    [
        (_frames(1), (64, 64)),
        (_frames(8), (64, 8 * 66 - 2)),
        (_frames(9), (2 * 66 - 2, 8 * 66 - 2)),
        (_frames(3, 10, 30), (40, 3 * 122 - 2)),
        (_frames(2, 400, 300), (400, 602)),
    ],
)
def test_sheet_has_every_frame_in_its_place(frames: np.ndarray, shape: tuple[int, int]) -> None:
    sheet = contact_sheet(frames)
    assert sheet.shape == (*shape, 3)
    scale = sheet.shape[0] // frames.shape[1] if len(frames) < 8 else 1
    height, width = frames.shape[1] * scale + 2, frames.shape[2] * scale + 2
    for index in range(len(frames)):
        top, left = index // 8 * height, index % 8 * width
        assert (sheet[top : top + height - 2, left : left + width - 2] == index).all()
    if len(frames) == 9:
        assert (sheet[66:, 66:] == 255).all()
        assert (sheet[64:66] == 255).all()


def test_sheet_refuses_what_is_no_frames() -> None:
    for frames in (_frames(0), _frames(2)[0], _frames(2).astype(np.float32), _frames(2)[..., :1]):
        with pytest.raises(ValueError, match="frames must be uint8"):
            contact_sheet(frames)


def _write(folder: Path, title: str) -> Path:
    facts = {"episodes": "2", "a|b": "c\nd"}
    frames, command = _frames(2), "apv-fast collect --out x"
    return write_card(folder, title=title, command=command, sources=["here", "there"], facts=facts, frames=frames)


def test_card(tmp_path: Path) -> None:
    card = _write(tmp_path, "Walkers").read_text()
    for part in ("# Walkers\n", "| episodes | 2 |", "| a\\|b | c d |", "- here\n- there\n", "apv-fast collect --out x"):
        assert part in card
    assert "](contact_sheet.png)" in card and "## Licence" in card
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        np.testing.assert_array_equal(np.asarray(sheet), contact_sheet(_frames(2)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "contact_sheet.png"]


def test_a_card_is_renewed_but_nobody_elses(tmp_path: Path) -> None:
    _write(tmp_path, "One")
    assert "# Two\n" in _write(tmp_path, "Two").read_text()
    (tmp_path / "README.md").write_text("# Mine\n")
    assert _write(tmp_path, "Three").read_text() == "# Mine\n"


def test_mp4_is_nearly_lossless_and_repeats(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (12, 8, 8, 3), np.uint8)
    frames = blocks.repeat(8, 1).repeat(8, 2)  # saturated colours with sharp edges
    one = write_mp4(tmp_path / "deep" / "one.mp4", frames, fps=25)
    back = read_mp4(one)
    assert back.shape == frames.shape
    assert np.abs(back.astype(int) - frames).max() <= 3
    assert write_mp4(tmp_path / "two.mp4", frames, fps=25).read_bytes() == one.read_bytes()
    assert read_mp4(write_mp4(tmp_path / "three.mp4", frames[:1], fps=12.5)).shape == (1, 64, 64, 3)


def test_mp4_refuses_what_is_no_video(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frames must be uint8"):
        write_mp4(tmp_path / "a.mp4", _frames(2)[0], fps=25)
    with pytest.raises(ValueError, match="frames must be uint8"):
        write_mp4(tmp_path / "a.mp4", _frames(0), fps=25)
    assert not list(tmp_path.iterdir())

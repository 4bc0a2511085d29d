"""The card of a data set: a README.md that says what is in the folder and how it was made, and a sheet of frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from apv_fast.atomic_file import atomic_file

CARD, SHEET = "README.md", "contact_sheet.png"
SHEET_FRAMES = 32  # a good number for a sheet: four rows
LICENCE = (
    "These videos were rendered by a simulator from models that have a licence of their own; see there before passing "
    "them on."
)
_MARK = "<!-- written by apv-fast; a file without this line is left alone -->"
_COLUMNS, _GAP, _WIDTH = 8, 2, 1000  # frames a row, white pixels between them, pixels that a sheet is to be wide


def write_card(
    directory: Path,
    *,
    title: str,
    command: str,
    sources: Sequence[str],
    facts: Mapping[str, str],
    frames: np.ndarray,
    licence: str = LICENCE,
) -> Path:
    """Write ``README.md`` and ``contact_sheet.png`` into the folder and return the former.

    A README.md that somebody else wrote stays as it is.

    Args:
        directory: the data set's folder.
        title: its heading.
        command: the command line that makes it.
        sources: where the videos come from, one a line.
        facts: a table: sizes, settings.
        frames: uint8 ``[N, height, width, 3]``, N ≥ 1, from all over the data set.
        licence: what is known about it.

    Raises:
        DiskError: the disk is full.
    """
    with atomic_file(directory / SHEET) as file:
        Image.fromarray(contact_sheet(frames)).save(file, "PNG")
    path = directory / CARD
    if path.exists() and _MARK not in path.read_text(errors="replace"):
        return path
    table = [f"| {_cell(name)} | {_cell(value)} |" for name, value in facts.items()]
    lines = [f"# {title}", "", _MARK, "", f"![frames of the videos]({SHEET})", "", "| | |", "|---|---|", *table, ""]
    lines += ["## Sources", "", *(f"- {source}" for source in sources), ""]
    lines += ["## How it was made", "", "```", command, "```", "", "## Licence", "", licence, ""]
    with atomic_file(path) as file:
        file.write("\n".join(lines).encode())
    return path


def contact_sheet(frames: np.ndarray) -> np.ndarray:
    """Frames uint8 ``[N, height, width, 3]`` in rows of eight on white, every pixel a square; uint8 ``[h, w, 3]``.

    Raises:
        ValueError: the frames have another type or shape, or there are none.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames must be uint8 [N, height, width, 3], not {frames.dtype} {list(frames.shape)}")
    count, height, width, _ = frames.shape
    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    scale = max(1, _WIDTH // (_COLUMNS * width))
    frames = frames.repeat(scale, 1).repeat(scale, 2)
    height, width = height * scale + _GAP, width * scale + _GAP
    sheet = np.full((rows * height - _GAP, columns * width - _GAP, 3), 255, np.uint8)
    for index, frame in enumerate(frames):
        top, left = index // columns * height, index % columns * width
        sheet[top : top + len(frame), left : left + frame.shape[1]] = frame
    return sheet


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

"""What ``apv-fast collect`` tells of its videos: the names of its files, and ``dataset.json`` beside them.

Who reads the files finds here which belong to one episode, which camera filmed it and how it was rendered.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATASET_FILE = "dataset.json"
VIEWS_AGREE = 40  # characters of an npz file's name: time and UUID but for its last 8 digits
_VIEW_DIGITS = 8


@dataclass(frozen=True)
class VideoMetadata:
    """What is known of a video; None where nothing is."""

    episode: str | None = None
    """The same for all views of an episode, within a folder."""
    view: str | None = None
    quality: str | None = None
    """Of rendering."""


def npz_stem(begin: str, index: int, view: str) -> str:
    """Name, without the length, of an episode file: ``begin`` (28 characters), episode, view."""
    return f"{begin}{index:012x}{_digits(view)}"


def mp4_name(index: int, view: str) -> str:
    """Name of an MP4 file."""
    return f"{index:06d}-{view}.mp4"


def recorded_quality(folder: Path) -> str | None:
    """How what is in ``folder`` was rendered, if ``apv-fast collect`` made it."""
    world = _description(folder).get("world")
    return str(world["quality"]) if isinstance(world, dict) and "quality" in world else None


def video_metadata(path: Path) -> VideoMetadata:
    """What is known of one of the files; nothing if something else made it."""
    quality = recorded_quality(path.parent)
    if quality is None:
        return VideoMetadata()
    episode, _, view = path.stem.partition("-")
    for name in _description(path.parent).get("views", ()):
        if path.suffix == ".npz" and path.name[VIEWS_AGREE:].startswith(_digits(str(name))):
            return VideoMetadata(path.name[:VIEWS_AGREE], str(name), quality)
        if path.suffix == ".mp4" and view == name:
            return VideoMetadata(episode, view, quality)
    return VideoMetadata(quality=quality)


def _digits(view: str) -> str:
    return hashlib.sha256(view.encode()).hexdigest()[:_VIEW_DIGITS]


def _description(folder: Path) -> dict[str, Any]:
    """What is written beside the videos or one folder above; empty if there is nothing that can be read."""
    for path in (folder / DATASET_FILE, folder.parent / DATASET_FILE):
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(content, dict):
            return content
    return {}

"""What is in a store's folder: the description, the lines of the index, the names of the files; see ``store.py``."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apv_fast.atomic_file import atomic_file
from apv_fast.data.episodes import EpisodeError

STORE_FILE = "store.json"
INDEX_FILE = "index.jsonl"
VERSION = 1
EPISODE = "episode"  # in a source


class StoreError(EpisodeError):
    """A store is damaged, of another version, or not what the caller takes it for."""


@dataclass(frozen=True)
class StoredEpisode:
    """A line of the index."""

    name: str
    """Unique in the store; episodes are in the order of their names."""
    shard: int
    """Number of the file with the frames."""
    offset: int
    """Byte at which they begin in it."""
    frames: int
    """How many."""
    crc32: int
    """Of the frames' bytes."""
    fps: float | None = None
    """Frames a second, if known."""
    camera: str | None = None
    """Name of the camera, if known."""
    quality: str | None = None
    """Render quality, if the frames were rendered and it is known."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """Where the frames came from: ``path``, ``bytes`` and ``mtime_ns`` of a file, or what else identifies it. Views of
    one and the same episode have the same ``episode`` (:data:`EPISODE`)."""


def is_store(directory: Path) -> bool:
    """Whether there is a store in ``directory``."""
    return (directory / STORE_FILE).is_file()


def shard_file(shard: int) -> str:
    """Name of a file of frames."""
    return f"frames-{shard:05d}.bin"


def read_description(directory: Path) -> dict[str, Any]:
    """What ``store.json`` says.

    Raises:
        StoreError: it is missing, damaged, or of another version.
    """
    path = directory / STORE_FILE
    try:
        description: dict[str, Any] = json.loads(path.read_text())
        version = description["version"]
        sizes = [description[name] for name in ("height", "width", "channels")]
    except FileNotFoundError as error:
        raise StoreError(directory, STORE_FILE, "is missing; a store is made by apv-fast ingest or collect") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(path, "content", f"cannot be read ({type(error).__name__}: {error})") from error
    if version != VERSION:
        raise StoreError(path, "version", f"must be {VERSION}, not {version!r}; use the apv-fast that made it")
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise StoreError(path, "height, width, channels", f"must be positive numbers, not {sizes}")
    return description


def describe(directory: Path, description: Mapping[str, Any]) -> None:
    """Write ``store.json``, or see that the one there says the same."""
    if not is_store(directory):
        if directory.exists() and any(directory.glob("frames-*.bin")):
            raise StoreError(directory, STORE_FILE, "is missing, but frames are there; choose another folder")
        directory.mkdir(parents=True, exist_ok=True)
        with atomic_file(directory / STORE_FILE) as file:
            file.write((json.dumps(description, indent=2) + "\n").encode())
        return
    before = read_description(directory)
    flat, flat_before = ({**one, **one["settings"]} for one in (description, before))
    for name in {**description, **description["settings"], **before["settings"]}:
        if name != "settings" and flat.get(name) != flat_before.get(name):
            is_, now = flat_before.get(name), flat.get(name)
            raise StoreError(directory, name, f"is {is_!r} in the store and {now!r} now; choose another folder")


def index_lines(directory: Path) -> Iterator[tuple[int, int, StoredEpisode]]:
    """Place, size and content of every line, up to one that its writer was killed in, or is just writing."""
    path = directory / INDEX_FILE
    start = 0
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                episode = StoredEpisode(**json.loads(line))
            except (ValueError, TypeError) as error:
                problem = f"cannot be read ({type(error).__name__}: {error}); copy the store again"
                raise StoreError(path, f"line {number}", problem) from error
            yield start, len(line), episode
            start += len(line)

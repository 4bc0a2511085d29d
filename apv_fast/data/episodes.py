"""Episode files in the official layout: ``{timestamp}-{uuid}-{length}.npz``, one finished episode each.

An episode of ``length`` transitions has ``length + 1`` rows: row 0 is what ``reset`` returned (action and reward zero),
row t the observation that ``action[t]`` led to. Keys: ``image`` uint8 ``[length + 1, height, width, 3]``; ``action``
float32 ``[length + 1, A]``; ``reward`` float32 ``[length + 1]``; ``is_first``, ``is_last``, ``is_terminal`` bool
``[length + 1]``; further keys are kept. Videos without actions and rewards have only ``VIDEO_KEYS``. The official code
reads what this writes and the other way round.
"""

from __future__ import annotations

import io
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from apv_fast.atomic_file import atomic_file

Episode = dict[str, np.ndarray]

VIDEO_KEYS = ("image", "is_first", "is_last", "is_terminal")
EPISODE_KEYS = (*VIDEO_KEYS, "action", "reward")
_NAME = re.compile(r"\d{8}T\d{6}-[0-9a-f]{32}-(\d+)\.npz")
_RANK = {"image": 4, "action": 2, "reward": 1, "is_first": 1, "is_last": 1, "is_terminal": 1}
_last_milliseconds = 0


class EpisodeError(ValueError):
    """An episode, or a file that should hold one, is not usable; the message names the file and the field."""

    def __init__(self, source: Path | str, field: str, problem: str) -> None:
        super().__init__(f"{source}: {field}: {problem}")
        self.source, self.field, self.problem = source, field, problem


def episode_length(path: Path) -> int:
    """Transitions in an episode, from the name of its file.

    Raises:
        EpisodeError: the name is not of the form ``{timestamp}-{uuid}-{length}.npz``.
    """
    match = _NAME.fullmatch(path.name)
    if not match:
        raise EpisodeError(path, "file name", "must be {timestamp}-{uuid}-{length}.npz")
    return int(match[1])


def read_episode(
    path: Path, keys: Sequence[str] = EPISODE_KEYS, *, image_shape: tuple[int, int, int] | None = None
) -> Episode:
    """Read and check ``keys`` of one file; no other key is even decompressed.

    Args:
        path: the file.
        keys: which arrays to read. Floating-point ones come as float32.
        image_shape: what ``image`` must be, height, width and channels; None: any size with three channels.

    Raises:
        EpisodeError: the file is damaged or unreadable, a key is missing, or an array has the wrong type or shape.
    """
    length = episode_length(path)
    try:
        with path.open("rb") as file:  # opened here because np.load leaves a damaged file open
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("not a zip archive of arrays")
            episode = {key: _read_array(archive, key, path) for key in keys}
    except EpisodeError:
        raise
    except Exception as error:  # damage shows in whatever layer meets it first: the file, zip, or NumPy's header
        raise EpisodeError(path, "archive", f"cannot be read ({_reason(error)})") from error
    return check_episode(episode, path, length=length, image_shape=image_shape)


def write_episode(directory: Path, episode: Mapping[str, np.ndarray], *, stem: str | None = None) -> Path:
    """Write a finished episode into ``directory``, made if necessary, and return the file's path.

    The file appears complete or not at all. Names sort in the order of writing (within a process), unless ``stem``,
    ``{timestamp}-{uuid}``, is given; then a file of that name is replaced.

    Raises:
        EpisodeError: an array has the wrong type or shape, or a key of ``VIDEO_KEYS`` is missing.
        DiskError: the disk is full; nothing that was there is lost.
    """
    for key in VIDEO_KEYS:
        if key not in episode:
            raise EpisodeError(directory, key, f"is missing; the episode has: {', '.join(episode)}")
    length = len(episode["image"]) - 1
    checked = check_episode(dict(episode), directory, length=length)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{stem or _new_stem()}-{length}.npz"
    packed = io.BytesIO()  # the zip writer would seek back and forth in the file
    np.savez_compressed(packed, **checked)  # type: ignore[arg-type]
    with atomic_file(path) as file:
        file.write(packed.getbuffer())
    return path


def stack_transitions(transitions: Sequence[Mapping[str, object]]) -> Episode:
    """Rows ``{"image": …, "action": …, "reward": …, "is_first": …, …}`` as one episode, floats as float32.

    Raises:
        EpisodeError: the rows do not have the same keys and shapes.
    """
    episode = {}
    for key in transitions[0]:
        try:
            episode[key] = _as_stored(np.stack([np.asarray(row[key]) for row in transitions]))
        except (KeyError, ValueError) as error:
            raise EpisodeError("transitions", key, "must be in every row, with the same shape") from error
    return episode


def check_episode(
    episode: Episode, source: Path | str, *, length: int, image_shape: tuple[int, int, int] | None = None
) -> Episode:
    """``episode`` with floating-point arrays as float32, if it is as the head of this file says.

    Raises:
        EpisodeError: it is not; ``source`` says whose episode it is.
    """
    checked = {}
    for key, value in episode.items():
        problem = _problem(key, value, length + 1, image_shape)
        if problem:
            raise EpisodeError(source, key, f"{problem}, not {value.dtype} {list(value.shape)}")
        checked[key] = _as_stored(value)
        if checked[key].dtype == np.float32 and not np.isfinite(checked[key]).all():
            raise EpisodeError(source, key, "must be finite; it has NaN or infinity")
    return checked


def _read_array(archive: np.lib.npyio.NpzFile, key: str, path: Path) -> np.ndarray:
    if key not in archive.files:
        raise EpisodeError(path, key, f"is missing; the file has: {', '.join(archive.files)}")
    try:
        array: np.ndarray = archive[key]
    except Exception as error:  # as above, and zlib
        raise EpisodeError(path, key, f"cannot be read ({_reason(error)})") from error
    return array


def _problem(key: str, value: np.ndarray, rows: int, image_shape: tuple[int, int, int] | None) -> str:
    """What ``value`` must be and is not, or nothing."""
    if key == "image":
        shape = image_shape or (*value.shape[1:3], 3)
        if value.dtype != np.uint8 or value.ndim != 4 or value.shape[1:] != shape or 0 in shape:
            sizes = ", ".join(str(size) for size in shape) if image_shape else "height, width, 3"
            return f"must be uint8 [{rows}, {sizes}]"
    elif key.startswith("is_") and value.dtype != np.bool_:
        return f"must be bool [{rows}]"
    elif key in ("action", "reward") and not np.issubdtype(value.dtype, np.floating):
        return "must be floating-point"
    elif not (np.issubdtype(value.dtype, np.number) or value.dtype == np.bool_):
        return "must be numbers"
    if key in _RANK and value.ndim != _RANK[key]:
        return f"must have {_RANK[key]} dimensions"
    if value.ndim == 0 or len(value) != rows:
        return f"must have {rows} rows (the episode's length plus one)"
    return ""


def _as_stored(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32, copy=False) if np.issubdtype(value.dtype, np.floating) else value


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _new_stem() -> str:
    """Beginning of a fresh file name; its UUID is of version 7, which begins with the time, so that names sort by it.

    The official code puts a random UUID behind seconds of local time; the order within a second, and with it every
    draw from the replay, would then differ from run to run.
    """
    global _last_milliseconds
    _last_milliseconds = max(time.time_ns() // 1_000_000, _last_milliseconds + 1)
    random = uuid.uuid4().int & (1 << 76) - 1
    version, variant = 7 << 76, 0b10 << 62
    identifier = uuid.UUID(int=_last_milliseconds << 80 | version | random & ~(0b11 << 62) | variant)
    timestamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(_last_milliseconds / 1000))
    return f"{timestamp}-{identifier.hex}"

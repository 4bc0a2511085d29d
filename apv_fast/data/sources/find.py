"""What a path holds, by the names of the files in it."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from apv_fast.data.sources import hdf5, images, lerobot, video
from apv_fast.data.sources.clip import ClipOptions, Source, SourceError
from apv_fast.data.sources.hdf5 import Hdf5File
from apv_fast.data.sources.images import FrameFolder, natural_order
from apv_fast.data.sources.npz import EpisodeFile
from apv_fast.data.sources.video import VideoFile
from apv_fast.data.store import is_store

READABLE = (
    "video files (MP4, MOV, AVI, MKV, WebM, GIF, …), folders of PNG or JPEG frames, npz episodes, "
    "LeRobot v3 datasets and robomimic HDF5 files"
)


def open_source(path: Path, options: ClipOptions) -> list[Source]:
    """Everything in ``path`` that can be read, in natural order: a file, or a folder with all below it.

    Which kind a file is follows from its name; what is in it is looked at when it is read. Names of sources begin
    with the last part of ``path``. Hidden files are left alone, pictures beside videos are not taken for frames,
    and a store below ``path`` is left out, with a warning.

    Raises:
        SourceError: it does not exist, or there is nothing that can be read; says what was found.
        ImportError: a dataset needs a package that is not installed.
    """
    if not path.exists():
        raise SourceError(path, "path", "does not exist")
    name = path.resolve().name
    if path.is_file():
        source = _file(path, name, options)
        if source is None:
            raise SourceError(path, "file", f"{path.suffix or 'no suffix'} is not known; what can be read: {READABLE}")
        return [source]
    if is_store(path):
        raise SourceError(path, "folder", "is a store already; give it to apv-fast pretrain --data as it is")
    others: Counter[str] = Counter()
    sources = list(_folder(path, name, options, others, set()))
    if not sources:
        seen = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in others.most_common(5))
        problem = f"has nothing to read; files found: {seen or 'none'}; what can be read: {READABLE}"
        raise SourceError(path, "folder", problem)
    return sources


def _folder(path: Path, name: str, options: ClipOptions, others: Counter[str], seen: set[Path]) -> Iterator[Source]:
    if path.resolve() in seen:  # a link to where it is itself
        return
    seen.add(path.resolve())
    if is_store(path):
        warnings.warn(f"left out {path}: it is a store already; give it to apv-fast pretrain --data", stacklevel=2)
        return
    if (path / lerobot.INFO).is_file():
        yield from lerobot.open_lerobot(path, name, options)
        return
    with os.scandir(path) as entries:
        kinds = {entry.name: entry.is_dir() for entry in entries if not entry.name.startswith(".")}
    files = natural_order(file for file, folder in kinds.items() if not folder)
    pictures = tuple(file for file in files if Path(file).suffix.lower() in images.EXTENSIONS)
    sources = [source for file in files if (source := _file(path / file, f"{name}/{file}", options))]
    if len(pictures) > 1 and not sources:
        sources = [FrameFolder(name, path, pictures)]
    elif not sources:
        others.update(Path(file).suffix.lower() for file in files)
    yield from sources
    for folder in natural_order(file for file, folder in kinds.items() if folder):
        yield from _folder(path / folder, f"{name}/{folder}", options, others, seen)


def _file(path: Path, name: str, options: ClipOptions) -> Source | None:
    suffix = path.suffix.lower()
    if suffix in video.EXTENSIONS:
        return VideoFile(name, path)
    if suffix == ".npz":
        return EpisodeFile(name, path)
    if suffix in hdf5.EXTENSIONS:
        hdf5.h5py()  # a worker that misses it would skip the file
        return Hdf5File(f"{name}/{options.camera}" if options.camera else name, path)
    return None

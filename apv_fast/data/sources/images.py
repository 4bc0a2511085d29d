"""Folders whose pictures are the frames of one video."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from apv_fast.data.sources.clip import Clip, ClipOptions, Source, SourceError, cut, resize

EXTENSIONS = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".webp"))


@dataclass(frozen=True)
class FrameFolder(Source):
    """A folder of frames, in natural order: 2.png before 10.png."""

    files: tuple[str, ...] = field(repr=False)

    def stamp(self) -> dict[str, int]:
        """Of all the files together."""
        statuses = [(self.path / file).stat() for file in self.files]
        newest = max(status.st_mtime_ns for status in statuses)
        return {"bytes": sum(status.st_size for status in statuses), "mtime_ns": newest}

    def clips(self, options: ClipOptions) -> Iterator[Clip]:
        """See :class:`Source`."""
        return cut(Clip(self.name, self._frames(options)), options.max_frames)

    def _frames(self, options: ClipOptions) -> Iterator[np.ndarray]:
        size = None
        for file in self.files:
            image = read_picture(self.path / file, options)
            size = size or image.size
            if image.size != size:
                problem = f"is {image.width}×{image.height} and the first is {size[0]}×{size[1]}: not one video"
                raise SourceError(self.path / file, "size", problem)
            yield resize(image, options)


def read_picture(path: Path, options: ClipOptions) -> Image.Image:
    """A picture in RGB, upright.

    Raises:
        SourceError: it is damaged, or has more than 8 bits a channel.
    """
    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * options.size, 2 * options.size))  # a JPEG need not be decoded at full size
            if image.mode.startswith(("I", "F")):
                raise SourceError(path, "pixels", f"must have 8 bits a channel, not mode {image.mode}")
            return ImageOps.exif_transpose(image).convert("RGB")
    except SourceError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever their formats lead them to
        raise SourceError(path, "picture", f"cannot be read ({type(error).__name__}: {error})") from error


def natural_order(names: Iterable[str]) -> list[str]:
    """Sorted, with numbers by their value."""

    def key(name: str) -> tuple[list[int | str], str]:
        parts = re.split(r"(\d+)", name)  # text and digits in turn
        return [int(part) if index % 2 else part for index, part in enumerate(parts)], name

    return sorted(names, key=key)

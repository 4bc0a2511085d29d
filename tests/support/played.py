"""A source for tests of what reads sources: plays what it is told to, and fails as it is told to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from apv_fast.data.sources import Clip, ClipOptions, Source
from tests.support.video_files import plain


@dataclass(frozen=True)
class Played(Source):
    """Clips of ``(first frame, frames)``. In the middle of the last an error is raised, or a signal sent."""

    played: tuple[tuple[int, int], ...]
    error: Exception | int | None = None

    def clips(self, options: ClipOptions) -> Iterator[Clip]:
        for number, (first, count) in enumerate(self.played):
            yield Clip(f"{self.name}#{number}", self._frames(first, count, number + 1 == len(self.played)))

    def _frames(self, first: int, count: int, last: bool) -> Iterator[np.ndarray]:
        frames = plain(count, 64, 64, first)
        yield from frames[: count // 2]
        if last and isinstance(self.error, int):
            os.kill(os.getpid(), self.error)
        if last and isinstance(self.error, Exception):
            raise self.error
        yield from frames[count // 2 :]

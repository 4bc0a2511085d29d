"""Decoded frames outside of RAM: an anonymous file, read chunk by chunk.

A million 64×64 frames are 12 GB decoded, and inflating a whole episode for every sequence drawn takes longer than
training on it. So frames are inflated once into a file that has no name (it vanishes with the process, even a killed
one). The operating system keeps what is used often in spare RAM and gives it up when someone needs it.
"""

from __future__ import annotations

import bisect
import os
import tempfile
import weakref
from pathlib import Path

import numpy as np

from apv_fast.atomic_file import disk_error


class FrameCache:
    """Runs of equally large frames, each run kept together; freed space is used again.

    Args:
        directory: where the file lives. It grows to the frames held at once, not compressed.
        frame_bytes: size of a frame.
    """

    def __init__(self, directory: Path, frame_bytes: int) -> None:
        self._directory = directory
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115  (lives as long as this object)
        self._close = weakref.finalize(self, self._file.close)
        self._frame_bytes = frame_bytes
        self._end = 0  # frames that the file has room for
        self._free: list[tuple[int, int]] = []  # (start, frames), by start, never adjacent

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return self._end * self._frame_bytes

    def write(self, frames: np.ndarray) -> int:
        """Store ``frames`` uint8 ``[n, …]`` and return their place.

        Raises:
            DiskError: the disk is full; what is stored already stays readable.
        """
        place = self._allocate(len(frames))
        view = np.ascontiguousarray(frames).data.cast("B")
        try:
            done = 0
            while done < len(view):
                done += os.pwrite(self._file.fileno(), view[done:], place * self._frame_bytes + done)
        except OSError as error:
            self.free(place, len(frames))
            raise disk_error(self._directory / "(decoded frames)", error) from error
        return place

    def read_into(self, place: int, out: np.ndarray) -> None:
        """Fill ``out`` ``[n, …]``, contiguous, with the n frames from ``place`` on."""
        view = out.data.cast("B")
        done = 0
        while done < len(view):
            got = os.preadv(self._file.fileno(), [view[done:]], place * self._frame_bytes + done)
            if got == 0:
                raise ValueError(f"frames {place} to {place + len(out)} are not stored")
            done += got

    def free(self, place: int, count: int) -> None:
        """Give back ``count`` frames from ``place`` on."""
        index = bisect.bisect(self._free, (place, 0))
        start, end = place, place + count
        if index < len(self._free) and self._free[index][0] == end:
            end += self._free.pop(index)[1]
        if index > 0 and sum(self._free[index - 1]) == start:
            start = self._free.pop(index - 1)[0]
        bisect.insort(self._free, (start, end - start))

    def close(self) -> None:
        """Give the space back to the disk."""
        self._close()

    def _allocate(self, count: int) -> int:
        for index, (start, room) in enumerate(self._free):
            if room >= count:
                self._free[index : index + 1] = [(start + count, room - count)] if room > count else []
                return start
        start = self._end
        if self._free and sum(self._free[-1]) == self._end:  # grow the last gap rather than leave it
            start = self._free.pop()[0]
        self._end = start + count
        return start

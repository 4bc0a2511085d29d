"""A copy of the replay on the device: a batch is drawn by one gather a key, and only its indices cross the bus.

The host still draws which sequences it wants and keeps every frame (:class:`apv_fast.data.frame_cache.FrameCache`), so
draws and checkpoints do not depend on where frames lie, and the copy can be given up at any time.
Rows lie at the places that the frame cache gave them.

Floor of a batch of B·T frames of 64×64×3: 2·12288·B·T bytes of device memory, 61 MB at 50×50, 18 µs of an H100's
3.35 TB/s; launches: a copy of 8·B·T bytes of indices and one gather a key. Frames are gathered in words of 8 bytes.
``index_select`` does that in one launch; a kernel of our own could save microseconds of an update's milliseconds.

Limits: one device. The buffers grow by half, and while one does, its old copy is there too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SHARE = 0.4  # of a GPU's memory that frames may take if nobody says otherwise
GROWTH = 1.5
FIRST_ROWS = 4096  # 50 MB of frames


@dataclass
class _Column:
    """One key's rows: ``buffer [capacity, words]``."""

    buffer: Tensor
    shape: tuple[int, ...]  # of a row
    dtype: torch.dtype


class DeviceRows:
    """Rows of every key on a device.

    Args:
        device: where.
        budget: bytes that the rows may take; None: :data:`SHARE` of the device's memory, if it is a GPU.
        strict: rows beyond the budget are an error; else :meth:`write` warns and says no.
    """

    def __init__(self, device: torch.device, budget: int | None = None, *, strict: bool = False) -> None:
        if budget is None:
            whole = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf
            budget = int(SHARE * whole) if whole < math.inf else 2**62
        self.device, self.budget, self.strict = device, budget, strict
        self._columns: dict[str, _Column] = {}
        self._capacity = 0

    @property
    def bytes(self) -> int:
        """Memory that the rows take."""
        return sum(column.buffer.nbytes for column in self._columns.values())

    def write(self, place: int, rows: Mapping[str, np.ndarray]) -> bool:
        """Store ``rows`` (``[n, …]`` by key) from ``place`` on; False if they do not fit, after a warning.

        Raises:
            MemoryError: they do not fit, and this is ``strict``.
        """
        words = {key: _as_words(value) for key, value in rows.items()}
        if not self._columns:
            self._columns = {
                key: _Column(torch.empty(0, words[key].shape[1], dtype=words[key].dtype), *_form(value))
                for key, value in rows.items()
            }
        end = place + len(next(iter(words.values())))
        if end > self._capacity and (problem := self._grow(end)):
            if self.strict:
                raise MemoryError(f"replay: {problem}; use --replay-device host, or a smaller --capacity")
            warnings.warn(f"frames are drawn from the host from now on: {problem}", stacklevel=2)
            return False
        for key, value in words.items():
            self._columns[key].buffer[place:end].copy_(self._staged(value), non_blocking=True)
        return True

    def gather(self, places: Sequence[int], length: int) -> dict[str, Tensor]:
        """The ``length`` rows from each of B ``places`` on: ``[B, length, …]`` by key."""
        index = torch.from_numpy((np.asarray(places, np.int64)[:, None] + np.arange(length)).reshape(-1))
        index = self._staged(index).to(self.device, non_blocking=True)
        return {
            key: column.buffer.index_select(0, index).view(column.dtype).view(len(places), length, *column.shape)
            for key, column in self._columns.items()
        }

    def _staged(self, value: Tensor) -> Tensor:
        """``value`` where a copy to the device does not wait for the updates that are queued there.

        Such memory goes back to torch's allocator, which gives it out again when the copies from it are over.
        """
        return value.pin_memory() if self.device.type == "cuda" else value

    def _grow(self, rows: int) -> str:
        """Make room for ``rows``; why not, if there is none."""
        row_bytes = sum(c.buffer.shape[1] * c.buffer.element_size() for c in self._columns.values())
        most = self.budget // row_bytes
        if rows > most:
            needed, allowed = rows * row_bytes / 1e9, self.budget / 1e9
            return f"{rows} of them need {needed:.3g} GB of {self.device}, where they may take {allowed:.3g}"
        capacity = min(max(rows, int(GROWTH * self._capacity), FIRST_ROWS), most)
        try:
            for column in self._columns.values():
                larger = torch.empty(capacity, column.buffer.shape[1], dtype=column.buffer.dtype, device=self.device)
                larger[: self._capacity].copy_(column.buffer)
                column.buffer = larger
        except torch.OutOfMemoryError as error:
            return str(error).partition("\n")[0]
        self._capacity = capacity
        return ""


def _form(rows: np.ndarray) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of a row."""
    return rows.shape[1:], torch.from_numpy(rows[:0]).dtype


def _as_words(rows: np.ndarray) -> Tensor:
    """``rows [n, …]`` as ``[n, words]``, bytes in words of 8 where they are that many."""
    flat = torch.from_numpy(np.ascontiguousarray(rows)).reshape(len(rows), -1)
    return flat.view(torch.int64) if flat.dtype == torch.uint8 and flat.shape[1] % 8 == 0 else flat

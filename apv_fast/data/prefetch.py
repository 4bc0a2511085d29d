"""Batches read ahead by a thread while the trainer is busy.

The trainer's own thread draws (random numbers), in order; another reads the frames, which is copying from the
operating system's cache and leaves Python's lock alone. So the batches are those of a program without the thread, and
a checkpoint holds where drawing stood for the batch that was taken last: what was read ahead is drawn again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from apv_fast.data.video_dataset import Position, VideoDataset


class Prefetcher:
    """An endless supply of batches. A context manager, which closes the dataset too.

    Args:
        dataset: what to draw from; nobody else may draw from it.
        batch_size: sequences a batch (B).
        ahead: batches to keep ready; 0: read when asked. A dataset that lies on the device is not read ahead.
    """

    def __init__(self, dataset: VideoDataset, batch_size: int, ahead: int = 2) -> None:
        if ahead < 0:
            raise ValueError(f"prefetch is {ahead}; it must be at least 0")
        self.dataset = dataset
        self._batch_size, self._ahead = batch_size, ahead
        self._reader = ThreadPoolExecutor(1, "prefetch")  # one: batches from streams must be read in order
        self._ready: deque[tuple[Future[dict[str, Tensor]], Position]] = deque()
        self._position = dataset.position
        self._waited, self._since = 0.0, time.perf_counter()

    def next(self) -> dict[str, Tensor]:
        """The next batch, see :meth:`apv_fast.data.VideoDataset.read`.

        Raises:
            EpisodeError: a video cannot be read.
        """
        begin = time.perf_counter()
        if self._ahead == 0 or self.dataset.on_device:
            batch = self.dataset.sample(self._batch_size)
            self._position = self.dataset.position
        else:
            while len(self._ready) <= self._ahead:
                draw = self.dataset.draw(self._batch_size)
                self._ready.append((self._reader.submit(self.dataset.read, draw), self.dataset.position))
            future, self._position = self._ready.popleft()
            batch = future.result()
        self._waited += time.perf_counter() - begin
        return batch

    def take_wait(self) -> float:
        """Share of the time since the last call that :meth:`next` took: what faster reading could save at most."""
        now = time.perf_counter()
        share = self._waited / max(now - self._since, 1e-9)
        self._waited, self._since = 0.0, now
        return share

    def state_dict(self) -> dict[str, Any]:
        """The dataset's state as of the last batch taken."""
        return self.dataset.state_dict(self._position)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a checkpoint, see :meth:`apv_fast.data.VideoDataset.load_state_dict`."""
        self._drop()
        self.dataset.load_state_dict(state)
        self._position = self.dataset.position

    def close(self) -> None:
        """Stop reading, close the dataset."""
        self._drop()
        self._reader.shutdown()
        self.dataset.close()

    def __enter__(self) -> Prefetcher:
        """This."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close."""
        self.close()

    def _drop(self) -> None:
        """Forget what was read ahead; nothing is being read afterwards."""
        while self._ready:
            future, _ = self._ready.pop()
            if not future.cancel():
                future.exception()

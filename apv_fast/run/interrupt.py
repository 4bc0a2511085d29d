"""Stopping a long job so that it can be continued."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

PATIENCE_S = 5.0  # that someone who asked for the end has


class StopRequest:
    """Whether someone asked for the end; a loop looks at ``requested`` where it is safe to stop."""

    requested = False
    _seen: float | None = None

    @property
    def overdue(self) -> bool:
        """Whether patience is over: what can be done again is to be given up. It is counted from the first look."""
        if not self.requested:
            return False
        self._seen = time.monotonic() if self._seen is None else self._seen
        return time.monotonic() - self._seen >= PATIENCE_S


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn the first Ctrl-C (or SIGTERM) into a request; the second one raises KeyboardInterrupt at once.

    The previous handlers are back after the block. Use it in the main thread, which alone gets signals.
    """
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if request.requested:
            raise KeyboardInterrupt
        request.requested = True
        name = signal.Signals(number).name
        print(f"{name}: stopping at the next safe point and saving; once more stops at once", file=sys.stderr)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

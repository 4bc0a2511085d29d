"""How far a long job is, how fast, and how long it will take: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as RichProgress

WINDOW_S = 60.0  # the rate is the mean over this much time: steps between evaluations should not look endless


class Progress:
    """A context manager around a loop of ``total`` steps, of which ``start`` are done (a resumed run).

    Args:
        description: what is being done.
        total: steps at the end.
        start: steps done already; they do not count for the rate.
        unit: what a step is called.
        interval_s: seconds between lines where the output is not a terminal.
        file: where to write; default: standard error.
        clock: seconds; tests give their own.
    """

    def __init__(
        self,
        description: str,
        total: int,
        *,
        start: int = 0,
        unit: str = "step",
        interval_s: float = 30.0,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._interval_s = interval_s
        self._file = file or sys.stderr
        self._clock = clock
        self._history = deque([(clock(), start)])  # (time, step) within the window
        self._printed = clock()
        self._bar: RichProgress | None = None
        if self._file.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = RichProgress(*columns, console=Console(file=self._file))
            self._task = self._bar.add_task(description, total=total, completed=start, text="")

    def update(self, step: int, text: str = "") -> None:
        """``step`` steps are done; ``text`` is shown behind, a loss for instance."""
        now = self._clock()
        self._history.append((now, step))
        while len(self._history) > 2 and now - self._history[1][0] >= WINDOW_S:
            self._history.popleft()
        shown = f"{step}/{self._total} {self._status(step)}{'  ' + text if text else ''}"
        if self._bar:
            self._bar.update(self._task, completed=step, text=shown)
        elif now - self._printed >= self._interval_s or step >= self._total:
            self._printed = now
            print(f"{self._description}: {shown}", file=self._file, flush=True)

    def _status(self, step: int) -> str:
        (then, before), (now, _) = self._history[0], self._history[-1]
        if step == before or now == then:
            return f"{self._unit}s"
        rate = (step - before) / (now - then)
        left = max(self._total - step, 0) / rate
        speed = f"{rate:.3g} {self._unit}s/s" if rate >= 1 else f"{1 / rate:.3g} s/{self._unit}"
        return f"{self._unit}s, {speed}, {_duration(left)} left"

    def __enter__(self) -> Progress:
        """Show the bar."""
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state on the screen."""
        if self._bar:
            self._bar.stop()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:d}:{minutes:02d}:{seconds:02d}"

"""The clock of a whole run, and the list of what was left out."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Ledger:
    """How much time there is, and what did not run and why.

    Args:
        seconds: of the whole run, from now on.
    """

    seconds: float
    start: float = field(default_factory=time.monotonic)
    not_run: dict[str, str] = field(default_factory=dict)  # what -> why
    problems: dict[str, str] = field(default_factory=dict)  # what broke -> how

    def until(self, share: float) -> float:
        """``time.monotonic()`` at which ``share`` of the time will have passed."""
        return self.start + share * self.seconds

    def left(self, until: float | None = None) -> float:
        """Seconds from now to ``until``, or to the end."""
        return (self.until(1.0) if until is None else until) - time.monotonic()

    def skip(self, what: str, why: str) -> None:
        """Note that ``what`` did not run."""
        self.not_run[what] = why

    def broke(self, what: str, how: str) -> None:
        """Note that ``what`` was tried and failed."""
        self.problems[what] = how

"""The clock of a whole run, and what it found: a file that is whole and up to date whenever the run is killed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Seconds that each stage has of a whole run, in their order: what is worth most comes first. "start" comes before all.
BUDGETS = {
    "start": 20.0,  # what GPU it is, the CUDA library, the cache of kernels
    "smoke": 60.0,
    "core": 90.0,
    "ceilings": 9.0,
    "rivals": 100.0,
    "train": 128.0,
    "tests": 23.0,
}
SECTIONS = tuple(BUDGETS)[1:]
SECONDS = sum(BUDGETS.values())
# What makes a row one of its own: a later one that agrees takes its place.
KEY = ("op", "shape", "dtype", "pass", "cache", "backend")


@dataclass
class Clock:
    """When each of some sections must have ended; what one does not use goes to the next.

    Args:
        seconds: of the whole run, from now on.
        sections: that are to run; they share the time as in :data:`BUDGETS`.
    """

    seconds: float = SECONDS
    sections: Sequence[str] = SECTIONS
    start: float = field(default_factory=time.monotonic)

    def until(self, section: str) -> float:
        """``time.monotonic()`` at which ``section`` must have ended."""
        spent, whole = BUDGETS["start"], BUDGETS["start"] + sum(BUDGETS[name] for name in self.sections)
        for name in SECTIONS[: SECTIONS.index(section) + 1]:
            spent += BUDGETS[name] * (name in self.sections)
        return self.start + self.seconds * spent / whole

    def left(self, until: float | None = None) -> float:
        """Seconds from now to ``until``, or to the end."""
        return (self.start + self.seconds if until is None else until) - time.monotonic()

    @property
    def taken(self) -> float:
        """Seconds until now."""
        return round(time.monotonic() - self.start, 1)


class Ledger:
    """Everything that a run found, and what broke or did not run and why; every change is in the file at once.

    Args:
        path: the file, JSON; None keeps no file.
        facts: of the machine.
        clock: of the run.
    """

    def __init__(self, path: Path | None, facts: Mapping[str, Any], clock: Clock) -> None:
        self.path, self.clock = path, clock
        self.report: dict[str, Any] = {"machine": dict(facts), "build": {}, "smoke": {}, "rows": [], "ceilings": {}}
        self.report |= {"train": {}, "tests": {}, "sanitizer": {}, "left_out": {}, "problems": {}, "not_run": {}}
        self.report |= {"seconds": 0.0, "complete": False}

    def save(self) -> None:
        """Write the file: to another name, and then in place, so that it is never half of one."""
        self.report["seconds"] = self.clock.taken
        if self.path is not None:
            write(self.path, json.dumps(self.report, indent=1) + "\n")

    def note(self, field: str, **what: Any) -> None:
        """Add to one of the dictionaries of :attr:`report`."""
        self.report[field] |= what
        self.save()

    def row(self, row: Mapping[str, Any]) -> None:
        """Add a row, in place of an earlier one of the same contestant, size, dtype, pass and cache."""
        rows = self.report["rows"]
        same = [i for i, old in enumerate(rows) if all(old[name] == row[name] for name in KEY)]
        if same:
            rows[same[0]] = dict(row)
        else:
            rows.append(dict(row))
        self.save()

    def skip(self, what: str, why: str) -> None:
        """Note that ``what`` did not run."""
        self.note("not_run", **{what: why})

    def broke(self, what: str, how: str) -> None:
        """Note that ``what`` was tried and failed."""
        self.note("problems", **{what: how})

    def went(self, what: str) -> None:
        """Take back that ``what`` did not run."""
        self.report["not_run"].pop(what, None)
        self.save()


def write(path: Path, text: str) -> None:
    """Replace a file's content: whoever reads it, at any time, sees the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)

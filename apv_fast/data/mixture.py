"""What ``--data`` names: places of videos, each perhaps with a weight."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_WEIGHTED = re.compile(r"(?s)(.+):([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)")


@dataclass(frozen=True)
class Entry:
    """One place of videos and how often it is drawn from, beside the others; None: as often as it has episodes."""

    path: Path
    weight: float | None = None


def parse_entries(values: Sequence[Path | str]) -> list[Entry]:
    """``["a:0.7", "b:0.3"]`` as entries. A path may contain colons; only a number behind the last one is a weight.

    Raises:
        ValueError: a weight is not positive, only some entries have one, a path is there twice, or there is none.
    """
    entries = []
    for value in values:
        match = _WEIGHTED.fullmatch(str(value))
        entry = Entry(Path(match[1]), float(match[2])) if match else Entry(Path(value))
        if entry.weight is not None and not 0 < entry.weight < float("inf"):
            raise ValueError(f"data: the weight of {entry.path} is {entry.weight:g}; it must be a positive number")
        entries.append(entry)
    if not entries:
        raise ValueError("data: there is no entry; name at least one folder, store or pattern of shards")
    without = [str(entry.path) for entry in entries if entry.weight is None]
    if 0 < len(without) < len(entries):
        raise ValueError(
            f"data: {', '.join(without)} has no weight but others have; give all entries one (PATH:0.5) or none"
        )
    paths = [entry.path for entry in entries]
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise ValueError(f"data: {twice} is there twice; name it once, with a weight if it should be drawn more often")
    return entries

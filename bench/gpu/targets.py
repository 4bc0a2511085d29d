"""What issue 3 asks of an H100, held against the rows of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FORWARD, FORWARD_BACKWARD = "forward", "forward_backward"
REFERENCE, COMPILED_GRAPH, TWO_SCANS = "reference", "torch.compile in a graph", "two scans, "
# What a claim may be about: our backends for ops, and the ways in which production runs an update.
OURS = ("cuda", "triton", "auto", "auto, without a graph")

Row = dict[str, Any]


def is_ours(contestant: str) -> bool:
    """Whether a contestant is our work, whose failure is a fault, and not a rival's."""
    return contestant.partition(",")[0] in (*OURS, TWO_SCANS.strip(", "))


@dataclass(frozen=True)
class Verdict:
    """One target beside its measurement."""

    what: str
    wanted: str
    measured: str  # "not measured" if there are no rows for it
    met: bool | None  # None: not measured


@dataclass(frozen=True)
class Group:
    """The rows of one op, size, dtype and pass, from a cold cache."""

    rows: Sequence[Row]

    def best(self) -> Row | None:
        """The fastest of ours."""
        ours = [row for row in self.rows if row["backend"] in OURS]
        return min(ours, key=lambda row: float(row["median_ms"])) if ours else None

    def of(self, backend: str) -> Row | None:
        """The row of a contestant."""
        return next((row for row in self.rows if row["backend"] == backend), None)

    def speedup(self, over: str) -> float | None:
        """How many times as long the contestant ``over`` takes as the fastest of ours."""
        best, other = self.best(), self.of(over)
        return None if best is None or other is None else other["median_ms"] / best["median_ms"]


def group(rows: Sequence[Row], op: str, dtype: str, passed: str, cache: str = "cold", **shape: int) -> Group:
    """The rows of one op, dtype, pass and cache whose sizes agree with ``shape``."""
    return Group(
        [
            row
            for row in rows
            if (row["op"], row["dtype"], row["pass"], row["cache"]) == (op, dtype, passed, cache)
            and shape.items() <= row["shape"].items()
        ]
    )


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Every target of the issue."""
    found: list[Verdict] = []
    limits = {(16, FORWARD): 0.6, (16, FORWARD_BACKWARD): 1.8, (50, FORWARD): 1.0, (50, FORWARD_BACKWARD): 3.0}
    for (batch, passed), limit in limits.items():
        scan = group(rows, "rssm_observe", "bfloat16", passed, B=batch)
        found.append(_at_most(f"observe B={batch} {passed}", scan, limit))
        if batch == 16:
            found.append(_at_least(f"observe B={batch} {passed} over eager", scan.speedup(REFERENCE), 20))
            found.append(_at_least(f"observe B={batch} {passed} over compile", scan.speedup(COMPILED_GRAPH), 2.5))
    for batch in (16, 50):
        stack = group(rows, "stacked_observe", "bfloat16", FORWARD_BACKWARD, B=batch)
        found.append(_at_least(f"stacked B={batch} over two scans", _over_two_scans(stack), 1.5))
    knn = group(rows, "knn_bonus", "float32", FORWARD, Q=2300)
    found.append(_at_most("kNN 2300 x 4096 x 128", knn, 0.08))
    pretrain = group(rows, "pretrain_update", "bfloat16", FORWARD_BACKWARD, B=16)
    found.append(_at_most("pre-training update B16 T25", pretrain, 4.0))
    finetune = group(rows, "finetune_update", "bfloat16", FORWARD_BACKWARD, B=50)
    found.append(_at_most("fine-tuning update B50 T50", finetune, 25.0))
    found.append(_at_least("fine-tuning update over eager", finetune.speedup(REFERENCE), 8))
    for name, update in (("pre-training", pretrain), ("fine-tuning", finetune)):
        found.append(_memory(f"{name} peak memory of eager's", update))
    return found


def _over_two_scans(stack: Group) -> float | None:
    best = stack.best()
    pairs = [row["median_ms"] for row in stack.rows if row["backend"].startswith(TWO_SCANS)]
    return min(pairs) / best["median_ms"] if best and pairs else None


def _at_most(what: str, found: Group, limit: float) -> Verdict:
    best = found.best()
    if best is None:
        return _missing(what, f"<= {limit} ms")
    return Verdict(what, f"<= {limit} ms", f"{best['median_ms']:.3f} ms", best["median_ms"] <= limit)


def _at_least(what: str, found: float | None, limit: float) -> Verdict:
    if found is None:
        return _missing(what, f">= {limit} x")
    return Verdict(what, f">= {limit} x", f"{found:.2f} x", found >= limit)


def _memory(what: str, found: Group) -> Verdict:
    best, eager = found.best(), found.of(REFERENCE)
    if best is None or eager is None or best["peak_mb"] is None or not eager["peak_mb"]:
        return _missing(what, "<= 60 %")
    share = best["peak_mb"] / eager["peak_mb"]
    return Verdict(what, "<= 60 %", f"{share:.0%} ({best['peak_mb']:.0f} MB)", share <= 0.6)


def _missing(what: str, wanted: str) -> Verdict:
    return Verdict(what, wanted, "not measured", None)

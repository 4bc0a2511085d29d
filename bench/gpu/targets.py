"""What is asked of an H200, held against the rows of a run; and who is who among the contestants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

FORWARD, FORWARD_BACKWARD = "forward", "forward_backward"
REFERENCE, TWO_SCANS, WITHOUT_GRAPH = "reference", "two scans, ", "auto, without a graph"
# What a claim may be about: our backends for ops, and the ways in which production runs an update.
OURS = ("cuda", "triton", "auto", WITHOUT_GRAPH)
COMPARED = ("cuda", "triton", "auto")  # of ours: what each rival takes turns with
BEST, CONTEXT_WM, YARDSTICK = "the best rival", "ContextWM", "cuDNN LSTM"  # the last is no implementation of the op

Row = dict[str, Any]


def is_ours(contestant: str) -> bool:
    """Whether a contestant is our work, whose failure is a fault, and not a rival's."""
    return contestant.partition(",")[0] in (*OURS, TWO_SCANS.strip(", "))


def is_rival(contestant: str) -> bool:
    """Whether a contestant's time counts where a target is about the best rival."""
    return not is_ours(contestant) and not contestant.startswith(YARDSTICK)


def is_core(contestant: str) -> bool:
    """Whether the targets cannot do without it: a claim of ours, both scans in place of the stack, the eager reference.

    The others are timed in a stage of their own.
    """
    return contestant in (*OURS, REFERENCE) or contestant.startswith(TWO_SCANS)


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

    def ratio(self, row: Row) -> float | None:
        """How many times as long a row took as the fastest of ours: in the same rounds, where the row says so."""
        best, beside = self.best(), row.get("beside_ms")
        ours = min(beside.values()) if beside else best and best["median_ms"]
        return float(row["median_ms"] / ours) if ours else None

    def speedup(self, over: str) -> float | None:
        """How many times as long a contestant takes as the fastest of ours; ``over`` may be :data:`BEST`, or a name's
        beginning.
        """
        rivals = [row for row in self.rows if is_rival(row["backend"])]
        rows = rivals if over == BEST else [row for row in rivals if row["backend"].startswith(over)]
        exact = self.of(over)
        ratios = [self.ratio(row) for row in ([exact] if exact else rows)]
        known = [ratio for ratio in ratios if ratio is not None]
        return min(known) if known else None

    def over_two_scans(self) -> tuple[float, str] | None:
        """How many times as long two scans take as the stack of the same backend, and the backend where it is most."""
        ratios = []
        for row in self.rows:
            both = self.of(TWO_SCANS + row["backend"])
            if row["backend"] in OURS and both:
                ratios.append((both["median_ms"] / row["median_ms"], row["backend"]))
        return max(ratios) if ratios else None


@dataclass(frozen=True)
class Rows:
    """Which rows: an op and dtype, and the sizes that matter."""

    op: str
    dtype: str
    shape: Mapping[str, int] = field(default_factory=dict)

    def agree(self, op: str, shape: Mapping[str, int], dtype: str) -> bool:
        """Whether a contest's rows are among them."""
        return (op, dtype) == (self.op, self.dtype) and self.shape.items() <= shape.items()

    def of(self, rows: Sequence[Row], passed: str, cache: str = "cold") -> Group:
        """Those of one pass and cache."""
        same = [row for row in rows if (row["pass"], row["cache"]) == (passed, cache)]
        return Group([row for row in same if self.agree(row["op"], row["shape"], row["dtype"])])


@dataclass(frozen=True)
class Target:
    """One line of the issue.

    ``kind``: "ms" at most ``limit``; "times" as long as ours takes ``over``, at least; "scans" the same for two scans
    against a stack; "memory" of the eager reference's peak, at most.
    """

    what: str
    rows: Rows
    passed: str
    kind: Literal["ms", "times", "scans", "memory"]
    limit: float
    over: str = ""


def _targets() -> tuple[Target, ...]:
    def scan(op: str, batch: int) -> Rows:
        return Rows(op, "bfloat16", {"B": batch, "T": 50})

    pretrain = Rows("pretrain_update", "bfloat16", {"B": 16, "T": 25})
    finetune = Rows("finetune_update", "bfloat16", {"B": 50, "T": 50})
    both, one = FORWARD_BACKWARD, FORWARD
    targets: list[Target] = []
    for batch, forward, backward in ((16, 0.6, 1.8), (50, 1.0, 3.0)):
        rows = scan("rssm_observe", batch)
        targets.append(Target(f"observe B={batch} forward", rows, one, "ms", forward))
        targets.append(Target(f"observe B={batch} forward+backward", rows, both, "ms", backward))
        if batch == 16:
            targets.append(Target(f"observe B={batch} over the best rival", rows, both, "times", 1.5, BEST))
    for batch in (16, 50):
        stack = scan("stacked_observe", batch)
        targets.append(Target(f"stacked B={batch} over two scans", stack, both, "scans", 1.5))
    targets.append(Target("kNN 2300 x 4096 x 128", Rows("knn_bonus", "float32", {"Q": 2300}), one, "ms", 0.08))
    targets.append(Target("pre-training update B16 T25", pretrain, both, "ms", 4.0))
    targets.append(Target("Meta-world update B50 T50", finetune, both, "ms", 20.0))
    for limit, over, name in ((8, REFERENCE, "eager"), (2, BEST, BEST), (8, CONTEXT_WM, "ContextWM's")):
        targets.append(Target(f"Meta-world update over {name}", finetune, both, "times", limit, over))
    for name, rows in (("pre-training", pretrain), ("Meta-world", finetune)):
        targets.append(Target(f"{name} peak memory of eager's", rows, both, "memory", 0.6))
    return tuple(targets)


TARGETS = _targets()


def about(op: str, shape: Mapping[str, int], dtype: str) -> tuple[bool, bool]:
    """Whether a target speaks of a contest, and whether one speaks of rivals in it."""
    targets = [target for target in TARGETS if target.rows.agree(op, shape, dtype)]
    return bool(targets), any(target.over not in ("", REFERENCE) for target in targets)


@dataclass(frozen=True)
class Verdict:
    """One target beside its measurement."""

    what: str
    limit: str
    measured: str  # "not measured" if there are no rows for it
    met: bool | None  # None: not measured


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Every target."""
    judges = {"ms": _at_most, "times": _at_least, "scans": _over_two_scans, "memory": _memory}
    return [judges[target.kind](target, target.rows.of(rows, target.passed)) for target in TARGETS]


def _at_most(target: Target, group: Group) -> Verdict:
    limit, best = f"<= {target.limit} ms", group.best()
    if best is None:
        return _missing(target, limit)
    return Verdict(target.what, limit, f"{best['median_ms']:.3f} ms", best["median_ms"] <= target.limit)


def _at_least(target: Target, group: Group) -> Verdict:
    limit, times = f">= {target.limit} x", group.speedup(target.over)
    if times is None:
        return _missing(target, limit)
    return Verdict(target.what, limit, f"{times:.2f} x", times >= target.limit)


def _over_two_scans(target: Target, group: Group) -> Verdict:
    limit, most = f">= {target.limit} x", group.over_two_scans()
    if most is None:
        return _missing(target, limit)
    return Verdict(target.what, limit, f"{most[0]:.2f} x ({most[1]})", most[0] >= target.limit)


def _memory(target: Target, group: Group) -> Verdict:
    limit, best, eager = f"<= {target.limit:.0%}", group.best(), group.of(REFERENCE)
    if best is None or eager is None or best["peak_mb"] is None or not eager["peak_mb"]:
        return _missing(target, limit)
    share = best["peak_mb"] / eager["peak_mb"]
    return Verdict(target.what, limit, f"{share:.0%} ({best['peak_mb']:.0f} MB)", share <= target.limit)


def _missing(target: Target, limit: str) -> Verdict:
    return Verdict(target.what, limit, "not measured", None)

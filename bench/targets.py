"""The CPU engine's targets held against a result: ``python -m bench.targets FILE...`` prints tables.

The first, in Markdown, has a line a target with the command that measures it anew: ours beside the best of PyTorch in
the same dtype, and in a column of its own how eager float32 compares. The second has the floor of every row of ours,
computed from its operations and bytes with the ceilings in the file, and the share of it that was reached. With
``--readme`` there is only the README's table.

Several files: what one lacks, such as the compiled scan, is looked up in the next; figures of a line are of one file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.cases.knn_bonus import FAISS
from bench.cases.stacked_observe import TWO_SCANS
from bench.cost.machine import CPU, with_ceilings
from bench.cost.ops import floor
from bench.plots import size_name
from bench.registry import (
    AUTOCAST,
    COMPILED,
    EAGER_FP32,
    FORWARD,
    FORWARD_BACKWARD,
    OURS,
    PLAIN,
    PYTORCH,
    REFERENCE,
)
from bench.report import Results, Row, read
from bench.roofline import columns

UNKNOWN = "not measured"
TITLES = {REFERENCE: "eager", PLAIN: "cdist, topk"}  # of contestants whose names say too little


@dataclass(frozen=True)
class Target:
    """One line: what ours is held against, all of it in the same dtype, and what is asked."""

    what: str
    op: str
    dtype: str
    only: str  # what ``--only`` selects the case by, behind the op's name
    shape: Mapping[str, int]
    over: Sequence[str] = PYTORCH  # the best of these
    times: float | None = None  # at least as many times as fast
    times_fp32: float | None = None  # at least as many times as fast as eager float32
    at_most: float | None = None  # milliseconds
    memory: float | None = None  # share of the other's
    passed: str = FORWARD_BACKWARD
    slow: bool = False

    @property
    def command(self) -> str:
        """What measures it."""
        return f'python -m bench --only "{self.op} {self.only}{self.dtype}"' + (" --slow" if self.slow else "")

    @property
    def limits(self) -> str:
        """The limits in words."""
        limits = []
        if self.times is not None:
            limits.append(f"≥ {self.times:g}×")
        if self.times_fp32 is not None:
            limits.append(f"≥ {self.times_fp32:g}× fp32")
        if self.at_most is not None:
            limits.append(f"≤ {duration(self.at_most)}")
        if self.memory is not None:
            limits.append(f"≤ {self.memory:.0%}")
        return ", ".join(limits)


@dataclass(frozen=True)
class Verdict:
    """A target beside what was measured, in milliseconds or megabytes; None where there is no row."""

    target: Target
    other: float | None = None  # of the best of ``over``
    who: str = ""  # that is
    ours: float | None = None
    fp32: float | None = None  # of eager float32, beside a row of bfloat16

    @property
    def ratio(self) -> float | None:
        """How many times as much the other needs."""
        return None if self.other is None or self.ours is None else self.other / self.ours

    @property
    def ratio_fp32(self) -> float | None:
        """How many times as much eager float32 needs."""
        return None if self.fp32 is None or self.ours is None else self.fp32 / self.ours

    @property
    def met(self) -> bool | None:
        """Whether all that is asked is reached; None: not measured."""
        asked = self.target
        limits = (
            (asked.times, self.ratio),
            (asked.times_fp32, self.ratio_fp32),
            (-asked.at_most if asked.at_most is not None else None, None if self.ours is None else -self.ours),
            (1 / asked.memory if asked.memory is not None else None, self.ratio),
        )
        reached = [None if value is None else value >= least for least, value in limits if least is not None]
        return None if None in reached else all(reached)


def duration(ms: float) -> str:
    """For example "0.15 ms", "132 ms" or "2.60 s"."""
    return f"{ms / 1e3:.2f} s" if ms >= 1000 else f"{ms:.3g} ms"


FP32, BF16 = "float32", "bfloat16"
FULL, NARROW, SMALL = {"deter": 1024}, {"deter": 200}, {"deter": 200, "cnn_depth": 16}
SCAN, HALF = {"B": 16, "T": 25, **FULL}, {"B": 16, "T": 25, **NARROW}
NOT_COMPILED = (REFERENCE, AUTOCAST)
OBSERVE, WIDE_, NARROW_ = "rssm_observe", "B=16 T=25*deter=1024*", "B=16 T=25*deter=200*"
STACKED, ROLLOUT, DREAM = "stacked_observe", "rssm_rollout", {"B": 400}
FINETUNE, PRETRAIN = "finetune_update", "pretrain_update"


def _acting(what: str, dtype: str, shape: Mapping[str, int], ms: float) -> Target:
    only = f"B=1 *deter={shape['deter']}*"
    return Target(what, "policy", dtype, only, {"B": 1, **shape}, at_most=ms, passed=FORWARD)


def _update(what: str, op: str, dtype: str, shape: Mapping[str, int], seconds: float) -> Target:
    only = f"B=16*deter={shape['deter']}*"
    return Target(what, op, dtype, only, {"B": 16, **shape}, at_most=1e3 * seconds)


TARGETS = (
    Target("observe, fp32", OBSERVE, FP32, WIDE_, SCAN, NOT_COMPILED, times=4),
    Target("observe, fp32, over torch.compile", OBSERVE, FP32, WIDE_, SCAN, (COMPILED,), times=2.5, slow=True),
    Target("observe, bf16", OBSERVE, BF16, WIDE_, SCAN, NOT_COMPILED, times=3, times_fp32=6.5),
    Target("observe, D=H=200, fp32", OBSERVE, FP32, NARROW_, HALF, NOT_COMPILED, times=6),
    Target("observe, D=H=200, bf16", OBSERVE, BF16, NARROW_, HALF, NOT_COMPILED, times_fp32=6),
    Target("stacked, fp32, over two own scans", STACKED, FP32, WIDE_, SCAN, (TWO_SCANS,), times=1.15),
    Target("stacked, bf16, over two own scans", STACKED, BF16, WIDE_, SCAN, (TWO_SCANS,), times=1.15),
    Target("imagination 400 × 15, fp32", ROLLOUT, FP32, "B=400*", DREAM, times=1.8),
    Target("imagination 400 × 15, bf16", ROLLOUT, BF16, "B=400*", DREAM, times_fp32=3.5),
    _acting("acting step, bf16", BF16, FULL, 2.2),
    _acting("acting step, D=H=200, fp32", FP32, NARROW, 0.15),
    Target(
        "kNN bonus 2300 × 4096 × 128", "knn_bonus", FP32, "Q=2300*", {"Q": 2300}, (*PYTORCH, FAISS), at_most=14,
        passed=FORWARD,
    ),
    _update("fine-tuning update, fp32", FINETUNE, FP32, FULL, 4.5),
    _update("fine-tuning update, bf16", FINETUNE, BF16, FULL, 2.6),
    _update("fine-tuning update, D=H=200, depth 16, fp32", FINETUNE, FP32, SMALL, 1.0),
    _update("fine-tuning update, D=H=200, depth 16, bf16", FINETUNE, BF16, SMALL, 0.65),
    _update("pre-training update, fp32", PRETRAIN, FP32, FULL, 1.9),
    _update("pre-training update, bf16", PRETRAIN, BF16, FULL, 1.1),
    Target("peak memory of observe, fp32", OBSERVE, FP32, WIDE_, SCAN, (REFERENCE,), memory=0.4),
    Target("peak memory of observe, bf16", OBSERVE, BF16, WIDE_, SCAN, (REFERENCE,), memory=0.4),
)  # fmt: skip

README = {  # which of them it has, and what it calls them
    "pre-training update, fp32": "Pre-training update, float32",
    "pre-training update, bf16": "Pre-training update, bfloat16",
    "fine-tuning update, fp32": "Fine-tuning update, float32",
    "fine-tuning update, bf16": "Fine-tuning update, bfloat16",
    "acting step, bf16": "Acting: a step of both models and the actor, bfloat16",
}


def verdict(target: Target, results: Sequence[Results]) -> Verdict:
    """From the first file that has what the target compares, else from what there is."""
    outcome = Verdict(target)
    for result in results:
        outcome = _verdict(target, result.rows)
        if outcome.met is not None and (outcome.other is not None or target.at_most is not None):
            return outcome
    return outcome


def _verdict(target: Target, rows: Sequence[Row]) -> Verdict:
    key = "median_ms" if target.memory is None else "peak_mb"
    values: dict[str, float] = {
        row["backend"]: row[key]
        for row in rows
        if (row["op"], row["dtype"], row["pass"]) == (target.op, target.dtype, target.passed)
        and row["device"] == "cpu"
        and target.shape.items() <= row["shape"].items()
        and row.get(key) is not None
    }
    who = min((name for name in target.over if name in values), key=values.__getitem__, default="")
    ours = min((values[name] for name in OURS if name in values), default=None)
    fp32 = values.get(EAGER_FP32) if target.memory is None else None
    return Verdict(target, values.get(who), who, ours, fp32)


def target_lines(results: Sequence[Results]) -> list[str]:
    """Markdown: what, PyTorch, ours, the ratio, over eager float32, target, whether it is met, command."""
    lines = [
        "| what | PyTorch, same dtype | ours | ratio | over eager fp32 | target | met | `python -m bench --only …` |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for target in TARGETS:
        outcome = verdict(target, results)
        other, ours = _quantity(outcome, outcome.other), _quantity(outcome, outcome.ours)
        if outcome.who:
            other += f" ({TITLES.get(outcome.who, outcome.who)})"
        ratio = _times(outcome.ratio)
        if target.memory is not None and outcome.ratio is not None:
            ratio = f"{1 / outcome.ratio:.0%}"
        met = {None: "?", True: "yes", False: "**no**"}[outcome.met]
        only = target.command.removeprefix("python -m bench --only ")
        cells = [target.what, other, ours, ratio, _times(outcome.ratio_fp32), target.limits, met, f"`{only}`"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def readme_lines(results: Sequence[Results]) -> list[str]:
    """Markdown: a few whole updates and a step of acting, beside the best of PyTorch in the same dtype."""
    lines = ["| | PyTorch, same dtype | apv-fast | times as fast | than PyTorch in float32 |", "|---|---|---|---|---|"]
    for what, name in README.items():
        outcome = verdict(next(target for target in TARGETS if target.what == what), results)
        times = outcome.ratio_fp32 or (outcome.ratio if outcome.target.dtype == FP32 else None)
        both = (_quantity(outcome, outcome.other), _quantity(outcome, outcome.ours))
        cells = [name, *both, _times(outcome.ratio), _times(times)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _quantity(outcome: Verdict, value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return duration(value) if outcome.target.memory is None else f"{value:.0f} MB"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}×"


def floor_lines(results: Sequence[Results]) -> list[str]:
    """A line per row of ours with a floor: milliseconds of both, the share, what binds."""
    table = [["op", "size", "dtype", "pass", "ours ms", "floor ms", "reached", "bound by"]]
    for result in results:
        machine = with_ceilings(CPU, result.ceilings)
        for row in result.rows:
            least = floor(row["op"], row["shape"], row["dtype"], row["pass"], machine)
            if row["device"] != "cpu" or row["backend"] not in OURS or least is None:
                continue
            ms, bound = 1e3 * least.seconds, least.bound.replace("HBM", "memory")
            what = [row["op"], size_name(row), row["dtype"], row["pass"]]
            table.append([*what, f"{row['median_ms']:.3f}", f"{ms:.3f}", f"{ms / row['median_ms']:.0%}", bound])
    return columns(table, 4)


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; 2 if a file cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m bench.targets", description="Targets of the CPU engine.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="of python -m bench --json")
    parser.add_argument("--readme", action="store_true", help="only the table of the README")
    options = parser.parse_args(arguments)
    try:
        results = [read(path) for path in options.files]
    except (OSError, ValueError) as error:
        print(f"bench.targets: {error}", file=sys.stderr)
        return 2
    if options.readme:
        print(*readme_lines(results), sep="\n")
    else:
        print(*target_lines(results), "", *floor_lines(results), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

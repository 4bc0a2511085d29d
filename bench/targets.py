"""The CPU engine's targets held against a result: ``python -m bench.targets FILE...`` prints tables.

The first, in Markdown, has a line a target with the command that measures it anew. The second has the floor of every
row of ours, computed from its operations and bytes with the ceilings in the file, and the share of it that was reached.
Several files: what one lacks, such as the compiled scan, is looked up in the next; figures of a line are of one file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.cases.knn_bonus import FAISS, PLAIN
from bench.cases.rssm_observe import TWO_SCANS
from bench.cost.machine import CPU, with_ceilings
from bench.cost.ops import floor
from bench.plots import size_name
from bench.registry import AUTOCAST, COMPILED, EAGER_FP32, FORWARD, FORWARD_BACKWARD, OURS, REFERENCE
from bench.roofline import columns

Row = Mapping[str, Any]  # of a result
UNKNOWN = "not measured"


@dataclass(frozen=True)
class Target:
    """One line: how many times as fast as the best of ``over``, or the most milliseconds, or share of its memory."""

    what: str
    op: str
    dtype: str
    only: str  # what ``--only`` selects the case by, behind the op's name
    shape: Mapping[str, int]
    over: Sequence[str] = (REFERENCE,)
    times: float | None = None
    at_most: float | None = None
    memory: float | None = None
    passed: str = FORWARD_BACKWARD
    slow: bool = False

    @property
    def command(self) -> str:
        """What measures it."""
        return f'python -m bench --only "{self.op} {self.only}{self.dtype}"' + (" --slow" if self.slow else "")

    @property
    def wanted(self) -> str:
        """The limit in words."""
        if self.times is not None:
            return f"≥ {self.times:g}×"
        return f"≤ {self.memory:.0%}" if self.memory is not None else f"≤ {duration(self.at_most or 0.0)}"


@dataclass(frozen=True)
class Verdict:
    """A target beside what was measured; None where there is no row."""

    target: Target
    other: float | None = None  # milliseconds, or megabytes, of the best of ``over``
    ours: float | None = None

    @property
    def ratio(self) -> float | None:
        """How many times as much the other needs."""
        return None if self.other is None or self.ours is None else self.other / self.ours

    @property
    def met(self) -> bool | None:
        """Whether it is reached; None: not measured."""
        if self.target.at_most is not None:
            return None if self.ours is None else self.ours <= self.target.at_most
        if self.ratio is None:
            return None
        return self.ratio >= (self.target.times or 1 / (self.target.memory or 1.0))


def duration(ms: float) -> str:
    """For example "0.15 ms", "132 ms" or "2.60 s"."""
    return f"{ms / 1e3:.2f} s" if ms >= 1000 else f"{ms:.3g} ms"


FP32, BF16 = "float32", "bfloat16"
FULL, NARROW, SMALL = {"deter": 1024}, {"deter": 200}, {"deter": 200, "cnn_depth": 16}
SCAN, HALF = {"B": 16, "T": 25, **FULL}, {"B": 16, "T": 25, **NARROW}
BEST_BF16 = (REFERENCE, AUTOCAST)
OBSERVE, WIDE_, NARROW_ = "rssm_observe", "B=16 T=25*deter=1024*", "B=16 T=25*deter=200*"
ROLLOUT, DREAM = "rssm_rollout", {"B": 400}


def _forward(
    what: str, op: str, dtype: str, only: str, shape: Mapping[str, int], over: Sequence[str], ms: float
) -> Target:
    return Target(what, op, dtype, only, shape, over, at_most=ms, passed=FORWARD)


def _update(what: str, op: str, dtype: str, shape: Mapping[str, int], seconds: float) -> Target:
    over = (REFERENCE,) if dtype == FP32 else (EAGER_FP32,)
    only = f"B=16*deter={shape['deter']}*"
    return Target(what, op, dtype, only, {"B": 16, **shape}, over, at_most=1e3 * seconds)


TARGETS = (
    Target("observe, fp32", OBSERVE, FP32, WIDE_, SCAN, times=4),
    Target("observe, fp32, over torch.compile", OBSERVE, FP32, WIDE_, SCAN, (COMPILED,), times=2.5, slow=True),
    Target("observe, bf16, over eager fp32", OBSERVE, BF16, WIDE_, SCAN, (EAGER_FP32,), times=6.5),
    Target("observe, bf16, over the best PyTorch bf16", OBSERVE, BF16, WIDE_, SCAN, BEST_BF16, times=3),
    Target("observe, D=H=200, fp32", OBSERVE, FP32, NARROW_, HALF, times=6),
    Target("observe, D=H=200, bf16, over eager fp32", OBSERVE, BF16, NARROW_, HALF, (EAGER_FP32,), times=6),
    Target("stacked, fp32, over two own scans", "stacked_observe", FP32, WIDE_, SCAN, (TWO_SCANS,), times=1.15),
    Target("stacked, bf16, over two own scans", "stacked_observe", BF16, WIDE_, SCAN, (TWO_SCANS,), times=1.15),
    Target("imagination 400 × 15, fp32", ROLLOUT, FP32, "B=400*", DREAM, times=1.8),
    Target("imagination 400 × 15, bf16, over eager fp32", ROLLOUT, BF16, "B=400*", DREAM, (EAGER_FP32,), times=3.5),
    _forward(
        "acting step, bf16, over the best PyTorch bf16",
        "policy",
        BF16,
        "B=1 *deter=1024*",
        {"B": 1, **FULL},
        BEST_BF16,
        2.2,
    ),
    _forward("acting step, D=H=200, fp32", "policy", FP32, "B=1 *deter=200*", {"B": 1, **NARROW}, (REFERENCE,), 0.15),
    _forward("kNN bonus 2300 × 4096 × 128", "knn_bonus", FP32, "Q=2300*", {"Q": 2300}, (PLAIN, FAISS), 14),
    _update("fine-tuning update, fp32", "finetune_update", FP32, FULL, 4.5),
    _update("fine-tuning update, bf16", "finetune_update", BF16, FULL, 2.6),
    _update("fine-tuning update, D=H=200, depth 16, fp32", "finetune_update", FP32, SMALL, 1.0),
    _update("fine-tuning update, D=H=200, depth 16, bf16", "finetune_update", BF16, SMALL, 0.65),
    _update("pre-training update, fp32", "pretrain_update", FP32, FULL, 1.9),
    _update("pre-training update, bf16", "pretrain_update", BF16, FULL, 1.1),
    Target("peak memory of observe, fp32", OBSERVE, FP32, WIDE_, SCAN, memory=0.4),
    Target("peak memory of observe, bf16", OBSERVE, BF16, WIDE_, SCAN, memory=0.4),
)


@dataclass(frozen=True)
class Result:
    """A file of ``python -m bench --json``."""

    rows: Sequence[Row]
    ceilings: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)


def read(path: Path) -> Result:
    """The rows on a CPU.

    Raises:
        ValueError: the file is no result of ``python -m bench``.
    """
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise ValueError(f"{path} is no file of python -m bench --json")
    rows = [row for row in content["rows"] if row.get("device") == "cpu"]
    return Result(rows, content.get("ceilings", {}), content.get("machine", {}))


def verdict(target: Target, results: Sequence[Result]) -> Verdict:
    """From the first file that has what the target compares, else from what there is."""
    found = Verdict(target)
    for result in results:
        found = _verdict(target, result.rows)
        if found.met is not None and (found.other is not None or target.at_most is not None):
            return found
    return found


def _verdict(target: Target, rows: Sequence[Row]) -> Verdict:
    key = "median_ms" if target.memory is None else "peak_mb"
    values: dict[str, float] = {
        row["backend"]: row[key]
        for row in rows
        if (row["op"], row["dtype"], row["pass"]) == (target.op, target.dtype, target.passed)
        and target.shape.items() <= row["shape"].items()
        and row.get(key) is not None
    }
    other = min((values[name] for name in target.over if name in values), default=None)
    return Verdict(target, other, min((values[name] for name in OURS if name in values), default=None))


def target_lines(results: Sequence[Result]) -> list[str]:
    """Markdown: what, the other, ours, ratio, target, whether it is met, command."""
    lines = [
        "| what | PyTorch | ours | ratio | target | met | `python -m bench --only …` |",
        "|---|---|---|---|---|---|---|",
    ]
    for target in TARGETS:
        found = verdict(target, results)
        quantity = duration if target.memory is None else "{:.0f} MB".format
        values = [UNKNOWN if value is None else quantity(value) for value in (found.other, found.ours)]
        ratio = "" if found.ratio is None else f"{found.ratio:.2f}×"
        if target.memory is not None and found.ratio is not None:
            ratio = f"{1 / found.ratio:.0%}"
        met = {None: "?", True: "yes", False: "**no**"}[found.met]
        only = target.command.removeprefix("python -m bench --only ")
        lines.append(f"| {' | '.join([target.what, *values, ratio, target.wanted, met, f'`{only}`'])} |")
    return lines


def floor_lines(results: Sequence[Result]) -> list[str]:
    """A line per row of ours with a floor: milliseconds of both, the share, what binds."""
    table = [["op", "size", "dtype", "pass", "ours ms", "floor ms", "reached", "bound by"]]
    for result in results:
        machine = with_ceilings(CPU, result.ceilings)
        for row in result.rows:
            found = floor(row["op"], row["shape"], row["dtype"], row["pass"], machine)
            if row["backend"] not in OURS or found is None:
                continue
            ms, bound = 1e3 * found.seconds, found.bound.replace("HBM", "memory")
            what = [row["op"], size_name(row), row["dtype"], row["pass"]]
            table.append([*what, f"{row['median_ms']:.3f}", f"{ms:.3f}", f"{ms / row['median_ms']:.0%}", bound])
    return columns(table, 4)


def main(arguments: list[str] | None = None) -> int:
    """Print both tables; 2 if a file cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m bench.targets", description="Targets of the CPU engine.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="of python -m bench --json")
    options = parser.parse_args(arguments)
    try:
        results = [read(path) for path in options.files]
    except (OSError, ValueError) as error:
        print(f"bench.targets: {error}", file=sys.stderr)
        return 2
    print(*target_lines(results), "", *floor_lines(results), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""``python -m bench.roofline``: what the ops must cost on an H200, H100 or A100, and beside it what they did cost.

A table of the phases of one step of the scan, then a line per op and size: the floor, what binds, barriers, launches.
``--targets`` prints the targets of :mod:`bench.gpu.targets` instead, each with its floor and what is expected of it.
``--measured FILE`` takes a file of ``python -m bench.device`` (or of ``python -m bench``): its ceilings replace the
data sheet's, its rows are printed beside their floors.

The model and its limits are in :mod:`bench.cost`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from bench.cost.machine import MACHINES, Machine, with_ceilings
from bench.cost.ops import PARTS, floor, knn_in_fp32, stack_of
from bench.cost.predict import HOST, KERNEL, LATENCY, SHARES, predictions
from bench.cost.scan import Scan, backward_step, forward_step, observe, two_scans
from bench.cost.work import Work, total

Row = Mapping[str, Any]  # of a benchmark's file
FORWARD, FORWARD_BACKWARD = "forward", "forward_backward"
FULL = {"deter": 1024, "hidden": 1024, "stoch": 32, "discrete": 32}
UPDATE = {"deter": 1024, "hidden": 1024, "cnn_depth": 48}
RATES = {machine.name: "the rates are data sheets'" for machine in MACHINES.values()} | {
    MACHINES["h200"].name: "copies and bf16 products are as one such machine had them, other rates are data sheets'"
}


class Question(NamedTuple):
    """One line of the table."""

    op: str
    shape: dict[str, int]
    dtype: str
    passed: str


def _scans() -> Iterator[Question]:
    for op, action in (("rssm_observe", 0), ("stacked_observe", 4)):
        for batch in (16, 50):
            for dtype in ("bfloat16", "tf32", "float32") if action == 0 else ("bfloat16",):
                shape = {"B": batch, "T": 50, "E": 1536, "A": action, **FULL}
                yield Question(op, shape, dtype, FORWARD)
                yield Question(op, shape, dtype, FORWARD_BACKWARD)


QUESTIONS = (
    *_scans(),
    Question("rssm_imagine", {"B": 2500, "T": 15, "A": 4, **FULL}, "bfloat16", FORWARD),
    Question("rssm_imagine", {"B": 2500, "T": 15, "A": 4, **FULL}, "bfloat16", FORWARD_BACKWARD),
    Question("rssm_rollout", {"B": 2500, "T": 15, "A": 4, **FULL}, "bfloat16", FORWARD),
    Question("rssm_rollout", {"B": 2500, "T": 15, "A": 4, **FULL}, "bfloat16", FORWARD_BACKWARD),
    Question("knn_bonus", {"Q": 2300, "N": 4096, "d": 128, "k": 16}, "float32", FORWARD),
    Question("video_bonus", {"B": 50, "T": 50, "F": 2048, "N": 4096, "d": 128, "k": 16}, "float32", FORWARD),
    Question("lambda_return", {"H": 15, "N": 2500}, "float32", FORWARD_BACKWARD),
    Question("image_loss", {"B": 50, "T": 50}, "bfloat16", FORWARD_BACKWARD),
    Question("normalize_image", {"B": 50, "T": 50}, "bfloat16", FORWARD),
    Question("keras_adam", {"models": 3}, "float32", FORWARD),
    Question("kl_balance", {"B": 50, "T": 50, "S": 32, "C": 32}, "float32", FORWARD_BACKWARD),
    Question("pretrain_update", {"B": 16, "T": 25, **UPDATE}, "bfloat16", FORWARD_BACKWARD),
    Question("pretrain_update", {"B": 50, "T": 50, **UPDATE}, "bfloat16", FORWARD_BACKWARD),
    Question("finetune_update", {"B": 50, "T": 50, **UPDATE, "horizon": 15}, "bfloat16", FORWARD_BACKWARD),
)


def shape_name(shape: Mapping[str, int]) -> str:
    """For example "B=16 T=50", without what all rows have in common."""
    common = {*FULL, "E", "A", "cnn_depth", "d", "k", "S", "C"}
    return " ".join(f"{name}={size}" for name, size in shape.items() if name not in common)


def columns(rows: Iterable[Sequence[str]], left: int) -> list[str]:
    """Rows as lines of aligned columns, the first ``left`` of them to the left."""
    table = [list(row) for row in rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def phase_lines(machine: Machine, batch: int) -> list[str]:
    """One step of the scan at full size in bfloat16, phase by phase."""
    scan = Scan.of({"B": batch, "T": 50, "E": 1536, "A": 0, **FULL}, "bfloat16")
    rows: list[Sequence[str]] = [("phase", "MFLOP", "L2 MB", "on-chip MB", "HBM MB", "µs", "of it barrier")]
    for name, steps in (("", forward_step(scan, machine)), ("back ", backward_step(scan, machine))):
        for work in steps:
            rows.append((name + work.name, *_bytes(work), *_time([work], machine)))
        rows.append((f"{name}step", "", "", "", "", *_time(steps, machine)))
    fits = f"{1 - scan.streamed(machine):.0%} of {scan.recurrent_bytes / 1e6:.1f} MB of weights stay on the SMs"
    return [f"One step, B={batch}, full size, bf16 ({fits}):", *columns(rows, 1)]


def _bytes(work: Work) -> tuple[str, ...]:
    return tuple(f"{number / 1e6:.2f}" for number in (work.flops, work.l2, work.shared, work.hbm))


def _time(works: Sequence[Work], machine: Machine) -> tuple[str, str]:
    least = total(works, machine)
    return f"{1e6 * least.seconds:.2f}", f"{1e6 * least.spent.get('barrier', 0):.2f}"


def _line(name: str, where: str, dtype: str, passed: str, parts: Sequence[Work], machine: Machine) -> list[str]:
    least = total(parts, machine)
    counts = [sum(getattr(part, kind) * part.times for part in parts) for kind in ("barriers", "launches")]
    return [name, where, dtype, passed, f"{1e3 * least.seconds:.3f}", least.bound, *(str(n) for n in counts)]


def op_lines(machine: Machine) -> list[str]:
    """A line per op and size."""
    rows = [["op", "size", "dtype", "pass", "floor ms", "most of it", "barriers", "launches"]]
    for op, shape, dtype, passed in QUESTIONS:
        parts = PARTS[op](shape, dtype, passed == FORWARD_BACKWARD, machine)
        rows.append(_line(op, shape_name(shape), dtype, passed, parts, machine))
    for op, shape, dtype, passed in QUESTIONS:
        back = passed == FORWARD_BACKWARD
        if op == "rssm_observe" and dtype == "bfloat16":
            phases = observe(replace(Scan.of(shape, dtype), persistent=False), machine, backward=back)
            rows.append(_line("a launch a phase", shape_name(shape), dtype, passed, phases, machine))
        elif op == "stacked_observe":
            both = two_scans(*stack_of(shape, dtype), machine, backward=back)
            rows.append(_line("two scans", shape_name(shape), dtype, passed, both, machine))
        elif op == "knn_bonus":
            rows.append(_line("product in fp32", shape_name(shape), dtype, passed, knn_in_fp32(shape), machine))
    return columns(rows, 4)


def share(row: Row, machine: Machine) -> float | None:
    """The floor's share of what a benchmark's row took, or None where there is no model."""
    least = floor(row["op"], row["shape"], row["dtype"], row["pass"], machine)
    return None if least is None else 1e3 * least.seconds / row["median_ms"]


def target_lines(machine: Machine) -> list[str]:
    """A line a target: the limit, the floor, the prediction, whether it is met; then what the predictions assume."""
    table = [["target", "limit", "floor ms", "predicted", "met", "counted"]]
    for row in predictions(machine):
        floor_ms = "" if row.floor is None else f"{1e3 * row.floor:.3f}"
        table.append([row.what, row.limit, floor_ms, row.predicted, "yes" if row.met else "NO", row.why])
    lines = columns(table, 6)
    lines += ["", "assumed, none of it measured: of the machine's rates"]
    lines += [f"  {name}: {s.rate:.0%} of operations, {s.memory:.0%} of bytes: {s.why}" for name, s in SHARES.items()]
    lines.append(f"  a phase of a scan waits {1e6 * LATENCY:.1f} us more, for the first operand's way from L2")
    lines.append(
        f"  rivals: {1e6 * KERNEL:.1f} us a small kernel of a chain in a graph, {1e6 * HOST:.0f} us an eager one"
    )
    return lines


def measured_lines(rows: Sequence[Row], machine: Machine) -> list[str]:
    """A line per row of a file, with its share of the floor."""
    table = [["op", "size", "dtype", "pass", "who", "floor ms", "measured ms", "floor/measured"]]
    for row in rows:
        part = share(row, machine)
        if part is not None:
            what = [row["op"], shape_name(row["shape"]), row["dtype"], row["pass"], row["backend"]]
            table.append([*what, f"{part * row['median_ms']:.3f}", f"{row['median_ms']:.3f}", f"{part:.0%}"])
    return columns(table, 5) if len(table) > 1 else ["the file has no row of an op that the model knows"]


def read(path: Path) -> tuple[list[Row], Mapping[str, float], str]:
    """Rows on a GPU, ceilings and the GPU's name of a file of ``bench.device`` or ``bench``.

    Raises:
        ValueError: it is neither.
    """
    content = json.loads(path.read_text())
    if isinstance(content, list):
        content = {"rows": content}
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise ValueError(f"--measured: {path} is no file of python -m bench.device or python -m bench")
    rows = [row for row in content["rows"] if row.get("device", "cuda") == "cuda"]
    return rows, content.get("ceilings", {}), content.get("machine", {}).get("GPU", "")


def main(arguments: list[str] | None = None) -> int:
    """Print the model; 2 if the file of measurements cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description="Floors of the ops on a GPU.")
    parser.add_argument("--gpu", choices=MACHINES, help="the machine (default: h200 with --targets, else h100)")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="a JSON file of python -m bench.device")
    parser.add_argument("--targets", action="store_true", help="what is predicted for every target, on an H200 alone")
    options = parser.parse_args(arguments)
    machine, rows, known = MACHINES[options.gpu or ("h200" if options.targets else "h100")], None, False
    if options.measured:
        try:
            rows, ceilings, name = read(options.measured)
        except (OSError, ValueError) as error:
            print(f"bench.roofline: {error}", file=sys.stderr)
            return 2
        machine, known = with_ceilings(machine, ceilings, name), "barrier_us" in ceilings
    where = f"{machine.sms} SMs, HBM {machine.hbm / 1e12:.2f} and L2 {machine.l2 / 1e12:.1f} TB/s"
    units = ", ".join(f"{unit} {rate / 1e12:.0f}" for unit, rate in machine.rates.items())
    print(f"{machine.name}: {where}; TFLOP/s {units};")
    origin = "measured" if known else "assumed"
    waits = f"barrier {1e6 * machine.barrier:.2f} µs, the stores before it {1e6 * machine.store:.2f} µs (assumed)"
    print(f"{waits}, launch in a graph {1e6 * machine.launch:.2f} µs ({origin})")
    if not known:
        print(f"{RATES[machine.name]}; that of L2 is assumed:", "all below is computed, nothing measured", sep="\n")
    if options.targets:
        print("", *target_lines(machine), sep="\n")
        return 0
    for batch in (16, 50):
        print("", *phase_lines(machine, batch), sep="\n")
    print("", *op_lines(machine), sep="\n")
    if rows is not None:
        print("", *measured_lines(rows, machine), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

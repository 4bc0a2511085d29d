"""The short table that ``python -m bench.device`` prints last: under 60 lines and 12,000 characters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.cost.machine import Machine
from bench.gpu.targets import BEST, REFERENCE, Group, Row, is_ours, verdicts
from bench.roofline import columns, shape_name, share

LINES, CHARACTERS = 59, 11_900
LISTED = 5  # failures, problems and omissions that are named; the rest are counted
WIDTH = 150  # of a line of text
YARDSTICKS = {"eager": REFERENCE, "graph": "reference in a graph", "best": BEST}  # heading -> contestant


def groups(rows: Sequence[Row]) -> dict[tuple[str, ...], Group]:
    """Rows of the same op, size, dtype, pass and cache, in the order of their first row."""
    by_key: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = (row["op"], shape_name(row["shape"]), row["dtype"], row["pass"], row["cache"])
        by_key.setdefault(key, []).append(row)
    return {key: Group(members) for key, members in by_key.items()}


def result_lines(rows: Sequence[Row], machine: Machine) -> list[str]:
    """A line per group: the fastest of ours, its share of the floor, and how many times as long the others take."""
    table = [["op", "size", "dtype", "pass", "ours ms", "p90", "floor", "who", *YARDSTICKS, "others ms"]]
    for (op, size, dtype, passed, cache), group in groups(rows).items():
        best = group.best()
        if best is None or cache != "cold":
            continue
        part = share(best, machine)
        ratios = [group.speedup(name) for name in YARDSTICKS.values()]
        table.append(
            [
                *(op, size, dtype, "f" if passed == "forward" else "f+b"),
                *(f"{best['median_ms']:.3f}", f"{best['p90_ms']:.3f}", "" if part is None else f"{part:.0%}"),
                best["backend"],
                *("" if ratio is None else f"{ratio:.1f}x" for ratio in ratios),
                _others(group, best),
            ]
        )
    return columns(table, 4) if len(table) > 1 else ["no contest has a result of ours"]


def _others(group: Group, best: Row) -> str:
    """The contestants that have no column of their own, rivals first."""
    known = {best["backend"], *YARDSTICKS.values()}
    rest = sorted((row for row in group.rows if row["backend"] not in known), key=lambda row: is_ours(row["backend"]))
    return ", ".join(f"{row['backend']} {row['median_ms']:.3f}" for row in rest)[:60]


def target_lines(rows: Sequence[Row]) -> list[str]:
    """The targets, which are for an H200, two a line to save room."""
    marks = {True: "met", False: "NOT MET", None: "-"}
    cells = [[v.what, v.limit, v.measured, marks[v.met]] for v in verdicts(rows)]
    half = (len(cells) + 1) // 2
    pairs = [left + right for left, right in zip(cells[:half], [*cells[half:], [""] * 4], strict=False)]
    return columns(pairs, 8)


def test_lines(tests: Mapping[str, Any]) -> Iterator[str]:
    """How the tests went."""
    if not tests:
        yield "tests: not run"
        return
    counts = ", ".join(f"{tests[name]} {name.replace('_', ' ')}" for name in ("passed", "failed", "skipped", "not_run"))
    yield f"tests: {counts} of {tests['collected']} in {tests['seconds']:.0f} s" + _error(tests)
    yield from _some([f"  FAILED {one['test']}: {one['why']}" for one in tests["failures"]])
    yield from _some([f"  at work when the time was up: {test}" for test in tests["unfinished"]])


def _error(part: Mapping[str, Any]) -> str:
    return f"; {part['error']}" if part.get("error") else ""


def _some(lines: Sequence[str]) -> Iterator[str]:
    yield from (line[:WIDTH] for line in lines[:LISTED])
    if len(lines) > LISTED:
        yield f"  and {len(lines) - LISTED} more, see the JSON file"


def ceiling_lines(ceilings: Mapping[str, float]) -> Iterator[str]:
    """Everything that was measured of the machine."""
    if ceilings:
        yield "ceilings: " + ", ".join(f"{name} {value:.4g}" for name, value in ceilings.items())


def smoke_lines(smoke: Mapping[str, Any]) -> Iterator[str]:
    """How the checks went: problems have lines of their own."""
    if smoke:
        passed = sum("error" not in check for check in smoke.values())
        longest = max(check["seconds"] for check in smoke.values())
        yield f"smoke: {passed} of {len(smoke)} checks passed, the longest in {longest:.0f} s"


def train_lines(train: Mapping[str, Any]) -> Iterator[str]:
    """What training measured, plain numbers and text only."""
    shown = [f"{name} {_short(value)}" for name, value in train.items() if isinstance(value, (int, float, str))]
    if shown:
        yield ("train: " + ", ".join(shown))[: 2 * WIDTH]


def _short(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def alone_lines(rows: Sequence[Row]) -> Iterator[str]:
    """Rows that are less than the others."""
    if alone := sum(bool(row.get("alone")) for row in rows):
        yield f"{alone} rows are of a contestant timed by itself: its contest did not come to its end"


def render(report: Mapping[str, Any], machine: Machine) -> str:
    """The whole table of a report; see :func:`bench.device.main` for its fields."""
    facts = report["machine"]
    lines = [f"{name}: {value}" for name, value in facts.items() if name in ("GPU", "versions", "commit")]
    built = report["build"]
    library = f"_cuda.so: {built.get('library', 'none')}, {built.get('nvcc') or 'no nvcc'}{_error(built)}"
    lines.append(library[:WIDTH])
    lines += smoke_lines(report["smoke"])
    lines += train_lines(report["train"])
    lines += test_lines(report["tests"])
    lines += ceiling_lines(report["ceilings"])
    lines += alone_lines(report["rows"])
    lines += _some([f"BROKEN {what}: {how}" for what, how in report["problems"].items()])
    lines += _some([f"no row: {what}: {why}" for what, why in report["left_out"].items()])
    lines += _some([f"not run: {what}: {why}" for what, why in report["not_run"].items()])
    # Results come last, the most important first: if the table is too long, it loses the least.
    return fit([*lines, "", *target_lines(report["rows"]), "", *result_lines(report["rows"], machine)])


def fit(lines: Sequence[str]) -> str:
    """The lines within what a reader of the last characters of an output sees."""
    kept = list(lines)
    while len(kept) > LINES or sum(len(line) + 1 for line in kept) > CHARACTERS:
        kept.pop()
    if len(kept) < len(lines):
        kept[-1] = f"... and {len(lines) - len(kept) + 1} lines more: see the JSON file"
    return "\n".join(kept)

"""The plots of a run; ``python -m bench.plots FILE`` draws those of a results file anew.

Beside FILE: how many times as fast as PyTorch in the same dtype (``FILE.png``), all medians (``-medians``), time
against the sizes of a scan (``-sizes``), shares of the floor (``-floors``), the parts of an update (``-updates``).
What is too long for a page goes on in ``-2.png`` and so on: no picture is larger than 1600 by 1200.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.cost.machine import CPU, with_ceilings
from bench.cost.ops import floor
from bench.registry import COMPILED, FORWARD_BACKWARD, OURS, PYTORCH, REFERENCE

if TYPE_CHECKING:
    from bench.report import Results, Row

Axes = Any  # matplotlib's
SWEEP = "observe_sweep"
MIDDLE = {"B": 16, "T": 25, "deter": 1024}
NAMES = {"B": "batch B", "T": "length T", "deter": "width D = H"}
STYLES = {"float32": "-", "bfloat16": "--"}
DTYPES = {"float32": "C0", "bfloat16": "C1"}
LINES = 40  # of a page at most
BARS = 18  # of updates


class Mark(NamedTuple):
    """A point of a line of a plot."""

    label: str  # of the line
    name: str  # of the legend
    value: float
    note: str = ""


def draw(path: Path, results: Results) -> list[Path]:
    """Every plot that there are rows for, beside ``path``; what was written."""
    import matplotlib

    matplotlib.use("Agg")
    paths = speedups(path.with_suffix(""), results)
    paths += medians(path.with_name(f"{path.stem}-medians"), results)
    sweep = [row for row in results.rows if row["op"] == SWEEP]
    if sweep:
        paths.append(sizes(path.with_name(f"{path.stem}-sizes.png"), sweep, results.facts))
    paths += floors(path.with_name(f"{path.stem}-floors"), shares(results.rows, results.ceilings), results.facts)
    for number, rows in enumerate(pages(results.updates, BARS)):
        paths.append(updates(_page(path.with_name(f"{path.stem}-updates"), number), rows, results.facts))
    return paths


def pages(items: Sequence[Any], most: int) -> list[Sequence[Any]]:
    """Split into as few parts of at most ``most`` as it takes, all about equally long."""
    count = -(-len(items) // most)
    return [items[len(items) * i // count : len(items) * (i + 1) // count] for i in range(count)]


def _page(stem: Path, number: int) -> Path:
    return stem.with_name(f"{stem.name}-{number + 1}.png" if number else f"{stem.name}.png")


def size_name(row: Mapping[str, Any]) -> str:
    """For example "B=16 T=25 D=1024", without what follows from the rest or is always the same."""
    names = {"deter": "D", "cnn_depth": "depth"}
    hidden = {"E", "A", "hidden", "stoch", "discrete", "d", "k", "S", "C", "horizon", "layers", "units"}
    return " ".join(f"{names.get(name, name)}={size}" for name, size in row["shape"].items() if name not in hidden)


def _title(facts: Mapping[str, str]) -> str:
    return f"{facts['CPU']}, {facts['threads']} threads, {facts['date']}"


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _colors(names: Iterable[str]) -> dict[str, str]:
    return {name: f"C{i}" for i, name in enumerate(dict.fromkeys(names))}


def _lines(
    stem: Path,
    points: Sequence[Mark],
    colors: Mapping[str, str],
    facts: Mapping[str, str],
    *,
    one: float | None = None,
    **settings: Any,
) -> list[Path]:
    """Marks on lines one below the other, on as many pages as it takes, with a line across at ``one``.

    ``settings`` are of the horizontal axis.
    """
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    labels = list(dict.fromkeys(mark.label for mark in points))
    paths = []
    for number, shown in enumerate(pages(labels, LINES)):
        figure, axes = plt.subplots(figsize=(12, 1.6 + 0.22 * len(shown)), layout="constrained")
        for position, label in enumerate(shown):
            marks = [mark for mark in points if mark.label == label]
            values = [mark.value for mark in marks]
            axes.plot([min(values), max(values)], [position] * 2, color="0.8", lw=1, zorder=0)
            for i, mark in enumerate(marks):
                axes.plot(mark.value, position, "o", color=colors[mark.name], ms=6)
                if mark.note:  # the second of two that are close goes below
                    below = i and marks[0].note
                    _note(axes, mark, position, colors[mark.name], -8 if below else 3)
        axes.set_yticks(range(len(shown)), shown, size=8)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.grid(alpha=0.3)
        if one is not None:
            axes.axvline(one, color="0.4", lw=1, zorder=0)
        axes.set(**settings)
        axes.set_title(_title(facts), size=8)
        handles = [Line2D([], [], marker="o", ls="", color=color, label=name) for name, color in colors.items()]
        figure.legend(handles=handles, loc="outside upper right", ncols=min(len(handles), 8), fontsize=8)
        paths.append(_save(figure, _page(stem, number)))
    return paths


def _note(axes: Axes, mark: Mark, position: float, color: str, up: float) -> None:
    where = {"xytext": (5, up), "textcoords": "offset points"}
    axes.annotate(mark.note, (mark.value, position), size=7, color=color, **where)


def speedups(stem: Path, results: Results) -> list[Path]:
    """How many times as fast ours is as the best of PyTorch in the same dtype, a line an op and size."""
    marks = [
        Mark(label, dtype, ratio, f"{ratio:.1f}×")
        for (label, dtype), ratio in ratios(results.rows).items()  # the pass with gradients, where there is one
    ]
    return _lines(
        stem,
        marks,
        {name: color for name, color in DTYPES.items() if any(mark.name == name for mark in marks)},
        results.facts,
        one=1.0,
        xscale="log",
        xticks=(ticks := (0.5, 1, 2, 3, 4, 6, 10, 20)),
        xticklabels=[f"{tick:g}×" for tick in ticks],
        xlabel="times as fast as the best of PyTorch in the same dtype",
    )


def ratios(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    """The best of PyTorch over the best of ours in the same dtype, by op and size, and dtype.

    Of the pass with gradients where there is one.
    """
    times: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["op"] != SWEEP:
            passes = times.setdefault((f"{row['op']} {size_name(row)}", row["dtype"]), {})
            passes.setdefault(row["pass"], {})[row["backend"]] = row["median_ms"]
    result = {}
    for key, passes in times.items():
        medians = passes.get(FORWARD_BACKWARD) or next(iter(passes.values()))
        ours = [medians[name] for name in OURS if name in medians]
        theirs = [medians[name] for name in PYTORCH if name in medians]
        if ours and theirs:
            result[key] = min(theirs) / min(ours)
    return result


def _three_digits(ms: float) -> str:
    return f"{ms:.3g}" if ms < 1000 else f"{ms:.0f}"


def medians(stem: Path, results: Results) -> list[Path]:
    """All medians, a line an op, size, dtype and pass."""
    rows = [row for row in results.rows if row["op"] != SWEEP] or results.rows
    marks = []
    for row in rows:
        label = f"{row['op']} {size_name(row)} {row['dtype']} {row['pass']}"
        note = _three_digits(row["median_ms"]) if row["backend"] in OURS else ""
        marks.append(Mark(label, row["backend"], row["median_ms"], note))
    colors = _colors([REFERENCE, *OURS, COMPILED, *(row["backend"] for row in rows)])
    colors = {name: color for name, color in colors.items() if any(mark.name == name for mark in marks)}
    return _lines(
        stem, marks, colors, results.facts, xscale="log", xlabel="milliseconds, median; the number is of ours"
    )


def sizes(path: Path, rows: Sequence[Row], facts: Mapping[str, str]) -> Path:
    """Time of ``rssm_observe`` with gradients against B, T and D, the others as in the middle."""
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(12, 4), sharey=True, layout="constrained")
    colors = _colors(row["backend"] for row in rows)
    for axes, size in zip(panels, MIDDLE, strict=True):
        fixed = {name: value for name, value in MIDDLE.items() if name != size}
        for dtype, style in STYLES.items():
            for backend, color in colors.items():
                points = sorted(
                    (row["shape"][size], row["median_ms"])
                    for row in rows
                    if (row["backend"], row["dtype"]) == (backend, dtype) and fixed.items() <= row["shape"].items()
                )
                if points:
                    axes.plot(*zip(*points, strict=True), style, marker="o", color=color, label=f"{backend}, {dtype}")
        axes.set(xscale="log", yscale="log", xlabel=NAMES[size])
        ticks = sorted({row["shape"][size] for row in rows})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_title(", ".join(f"{name}={value}" for name, value in fixed.items()), size=8)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("ms, observe, forward and backward")
    panels[0].legend(fontsize=8)
    figure.suptitle(_title(facts), size=8)
    return _save(figure, path)


def shares(rows: Sequence[Row], ceilings: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """Of every row on a CPU with a floor that is the reference or ours: label, contestant, share of the floor."""
    machine, entries = with_ceilings(CPU, ceilings), []
    for row in rows:
        if row["device"] != "cpu" or row["op"] == SWEEP or row["backend"] not in (REFERENCE, *OURS):
            continue
        least = floor(row["op"], row["shape"], row["dtype"], row["pass"], machine)
        if least is not None:
            label = f"{row['op']} {size_name(row)} {row['dtype']} {row['pass']}"
            entries.append((label, row["backend"], 1e3 * least.seconds / row["median_ms"]))
    return entries


def floors(stem: Path, entries: Sequence[tuple[str, str, float]], facts: Mapping[str, str]) -> list[Path]:
    """Shares of the floor, the reference's and ours."""
    marks = [
        Mark(label, backend, 100 * share, f"{share:.0%}" if backend in OURS else "")
        for label, backend, share in entries
    ]
    colors = _colors(backend for _, backend, _ in entries)
    what = "percent: what the operations and bytes need at the measured ceilings, over the median"
    return _lines(stem, marks, colors, facts, xlim=(0, 105), xlabel=what)


def updates(path: Path, rows: Sequence[Row], facts: Mapping[str, str]) -> Path:
    """Parts of whole updates, stacked: the reference's bar and ours below each other."""
    from matplotlib import pyplot as plt

    parts = sorted(
        {part for row in rows for part in row["parts_ms"]},
        key=lambda part: -sum(row["parts_ms"].get(part, 0.0) for row in rows),
    )
    colors = {part: f"C{i}" if i < 10 else f"C{i - 10}" for i, part in enumerate(parts)}
    figure, axes = plt.subplots(figsize=(12, 1.5 + 0.45 * len(rows)), layout="constrained")
    labels = []
    for position, row in enumerate(rows):
        left = 0.0
        for i, part in enumerate(parts):
            width = row["parts_ms"].get(part, 0.0)
            hatch = None if i < 10 else "//"
            axes.barh(
                position, width, left=left, color=colors[part], hatch=hatch, label=part if position == 0 else None
            )
            left += width
        axes.text(left, position, f" {left:.0f} ms", va="center", size=8)
        labels.append(f"{row['op']} {size_name(row)} {row['dtype']}\n{row['backend']}")
    axes.set_yticks(range(len(rows)), labels, size=8)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlabel("milliseconds, under torch's profiler")
    axes.set_title(_title(facts), size=8)
    figure.legend(loc="outside upper right", ncols=6, fontsize=8)
    return _save(figure, path)


def main(arguments: list[str] | None = None) -> int:
    """Draw the plots of a file; 2 if it cannot be read."""
    from bench import report

    parser = argparse.ArgumentParser(prog="python -m bench.plots", description="Draw the plots of a results file.")
    parser.add_argument("file", type=Path, metavar="FILE", help="of python -m bench --json")
    options = parser.parse_args(arguments)
    try:
        results = report.read(options.file)
    except (OSError, ValueError) as error:
        print(f"bench.plots: {error}", file=sys.stderr)
        return 2
    print(*draw(options.file, results), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The plots of a run: all medians, time against the sizes of a scan, shares of the floor, parts of an update."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.cost.machine import CPU, with_ceilings
from bench.cost.ops import floor
from bench.registry import OURS, REFERENCE

if TYPE_CHECKING:
    from bench.report import Results, Row

Axes = Any  # matplotlib's
SWEEP = "observe_sweep"
MIDDLE = {"B": 16, "T": 25, "deter": 1024}
NAMES = {"B": "batch B", "T": "length T", "deter": "width D = H"}
STYLES = {"float32": "-", "bfloat16": "--"}


def draw(path: Path, found: Results) -> list[Path]:
    """Every plot that there are rows for, beside ``path``; what was written."""
    import matplotlib

    matplotlib.use("Agg")
    made = [bars(path.with_suffix(".png"), found)]
    sweep = [row for row in found.rows if row["op"] == SWEEP]
    shared = shares(found.rows, found.ceilings)
    if sweep:
        made.append(sizes(path.with_name(f"{path.stem}-sizes.png"), sweep, found.facts))
    if shared:
        made.append(floors(path.with_name(f"{path.stem}-floors.png"), shared, found.facts))
    if found.updates:
        made.append(updates(path.with_name(f"{path.stem}-updates.png"), found.updates, found.facts))
    return made


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


def _legend(figure: Any, colors: Mapping[str, str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=color, label=name) for name, color in colors.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=min(len(handles), 6), fontsize=8)


def bars(path: Path, found: Results) -> Path:
    """Medians as bars on a logarithmic axis, grouped by case, with whiskers from p10 to p90."""
    from matplotlib import pyplot as plt

    rows = [row for row in found.rows if row["op"] != SWEEP] or found.rows
    colors = _colors(row["backend"] for row in rows)
    ticks: dict[str, float] = {}  # of the cases: the position of their first bar
    figure, axes = plt.subplots(figsize=(12, 2 + 0.28 * len(rows)), layout="constrained")
    position = 0.0
    for row in rows:
        label = f"{row['op']} {row['dtype']} {row['pass']}\n{size_name(row)}"
        position += 1 if label in ticks else 1.6
        ticks.setdefault(label, position)
        whisker = [[row["median_ms"] - row["p10_ms"]], [row["p90_ms"] - row["median_ms"]]]
        axes.barh(position, row["median_ms"], xerr=whisker, color=colors[row["backend"]], error_kw={"lw": 1})
        note = f"{row['median_ms']:.4g} ms, {row['baseline_ratio']:.2f}x"
        axes.text(row["p90_ms"] * 1.05, position, note, va="center", size=7)
    axes.set_yticks(list(ticks.values()), list(ticks), size=7)
    axes.set_xscale("log")
    axes.set_xlim(right=max(row["p90_ms"] for row in rows) * 8)
    axes.set_ylim(position + 1, 0.6)
    axes.set_xlabel("milliseconds, median (whiskers p10 to p90); x: the reference's median over this one")
    axes.set_title(_title(found.facts), size=8)
    _legend(figure, colors)
    return _save(figure, path)


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
    machine, found = with_ceilings(CPU, ceilings), []
    for row in rows:
        if row["device"] != "cpu" or row["op"] == SWEEP or row["backend"] not in (REFERENCE, *OURS):
            continue
        least = floor(row["op"], row["shape"], row["dtype"], row["pass"], machine)
        if least is not None:
            label = f"{row['op']} {size_name(row)} {row['dtype']} {row['pass']}"
            found.append((label, row["backend"], 1e3 * least.seconds / row["median_ms"]))
    return found


def floors(path: Path, found: Sequence[tuple[str, str, float]], facts: Mapping[str, str]) -> Path:
    """Shares of the floor as bars, the reference's over ours."""
    from matplotlib import pyplot as plt

    colors = _colors(backend for _, backend, _ in found)
    ticks: dict[str, float] = {}
    position = 0.0
    figure, axes = plt.subplots(figsize=(10, 1.5 + 0.2 * len(found)), layout="constrained")
    for label, backend, share in found:
        position += 1 if label in ticks else 1.6
        ticks.setdefault(label, position)
        axes.barh(position, 100 * share, color=colors[backend])
        axes.text(100 * share + 1, position, f"{share:.0%}", va="center", size=7)
    axes.set_yticks(list(ticks.values()), list(ticks), size=7)
    axes.set_ylim(position + 1, 0.6)
    axes.set_xlim(0, 105)
    axes.set_xlabel("percent: what the operations and bytes need at the measured ceilings, over the median")
    axes.set_title(_title(facts), size=8)
    _legend(figure, colors)
    return _save(figure, path)


def updates(path: Path, found: Sequence[Row], facts: Mapping[str, str]) -> Path:
    """Parts of whole updates, stacked: the reference's bar and ours below each other."""
    from matplotlib import pyplot as plt

    parts = sorted(
        {part for row in found for part in row["parts_ms"]},
        key=lambda part: -sum(row["parts_ms"].get(part, 0.0) for row in found),
    )
    colors = {part: f"C{i}" if i < 10 else f"C{i - 10}" for i, part in enumerate(parts)}
    figure, axes = plt.subplots(figsize=(12, 1.5 + 0.45 * len(found)), layout="constrained")
    labels = []
    for position, row in enumerate(found):
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
    axes.set_yticks(range(len(found)), labels, size=7)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlabel("milliseconds, under torch's profiler")
    axes.set_title(_title(facts), size=8)
    figure.legend(loc="outside upper right", ncols=6, fontsize=8)
    return _save(figure, path)

"""Learning curves as PNG files, the published ones of the same task beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from apv_fast.atomic_file import atomic_file
from apv_fast.run.curves import Curve, published_curves, read_curve

# Okabe and Ito's colours, which colour-blind people can tell apart; the markers say the same again.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def plot_runs(
    runs: Sequence[Path],
    out: Path,
    *,
    metric: str = "eval_return",
    also: Sequence[str] = (),
    task: str | None = None,
    x: str = "env_step",
) -> Path:
    """Draw ``metric`` of every run over ``x`` into the PNG ``out``.

    Args:
        runs: run directories; each has a ``metrics.jsonl``.
        out: the picture's file.
        metric: name in the metrics.
        also: further ones of every run, in the same picture.
        task: draw the published curves of this task as well (mean and range of the middle half of 8 seeds).
        x: name of the horizontal axis in the metrics; where a line has none, its ``step``.

    Raises:
        ValueError: a run does not have the metric; the message names its file and the metrics that it has.
    """
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes: Any = figure.subplots()
    for method, (steps, scores) in published_curves(task).items() if task else ():
        (line,) = axes.plot(steps, scores.mean(0), linestyle="--", linewidth=1, label=f"{method} (paper, 8 seeds)")
        low, high = np.percentile(scores, [25, 75], axis=0)
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    for run in runs:
        for name in (metric, *also):
            steps, values = read_curve(run, name, x)
            label = f"{run.resolve().name}: {name}" if also else run.resolve().name
            axes.plot(steps, values, marker="o", markersize=3, label=label)
    axes.set_xlabel("environment steps" if x == "env_step" else x)
    axes.set_ylabel(metric)
    if task:
        axes.set_title(task)
    axes.grid(alpha=0.3)
    axes.legend()
    return _save(figure, out)


def plot_curves(panels: Mapping[str, Mapping[str, Curve]], out: Path, *, metric: str) -> Path:
    """Draw interquartile means with their intervals into the PNG ``out``, a panel a task.

    Args:
        panels: by title, curves by name. A name has the same colour and marker in every panel; names that begin with
            ``"paper: "`` are dashed, and have the colour of the name that follows if there is such a curve.
        out: the picture's file.
        metric: label of the vertical axes.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    columns = 2 if len(panels) in (2, 4) else min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * rows + 0.8), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    handles: dict[str, Any] = {}
    for axes, (title, curves) in zip(grid.flat, panels.items(), strict=False):
        for name, curve in curves.items():
            handles.setdefault(name, _draw(axes, curve, **_style(name, names)))
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("environment steps")
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.set_ylabel(f"{metric}, interquartile mean")
        axes.grid(alpha=0.3)
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=min(len(names), 2 * columns), fontsize=10
    )
    return _save(figure, out)


PAPER = "paper: "


def _style(name: str, names: Sequence[str]) -> dict[str, Any]:
    ours = [one for one in names if not one.startswith(PAPER)]
    method = name.removeprefix(PAPER).partition(" ")[0].lower()
    index = ours.index(method) if method in ours else (*ours, *(one for one in names if one not in ours)).index(name)
    published = name.startswith(PAPER)
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": "" if published else MARKERS[index % len(MARKERS)],
        "linestyle": ("-.", "--", ":")[names.index(name) % 3] if published else "-",
        "linewidth": 1.2 if published else 1.8,
    }


def _draw(axes: Any, curve: Curve, *, color: str, **style: Any) -> Any:
    every = max(1, len(curve.steps) // 12)
    (line,) = axes.plot(curve.steps, curve.iqm, color=color, markersize=5, markevery=every, **style)
    axes.fill_between(curve.steps, curve.low, curve.high, color=color, alpha=0.15, linewidth=0)
    return line


def _save(figure: Any, out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as file:
        figure.savefig(file, format="png", dpi=150)
    return out

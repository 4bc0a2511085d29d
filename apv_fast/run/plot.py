"""Learning curves of runs as a PNG, the published ones of the same task beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from apv_fast.data.atomic import atomic_file
from apv_fast.run.metrics import read_metrics


def published_curves(task: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The paper's runs on ``task`` (``dmc_quadruped_walk``, ``metaworld_reach``, …); empty if it has none.

    Returns:
        By method: environment steps ``[n]`` and scores ``[seeds, n]`` (return for DMC, success rate for Meta-world).
    """
    curves: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for suite in _published().values():
        if isinstance(suite, dict):
            for method, tasks in suite["runs"].items():
                if task in tasks:
                    scores = np.array(tasks[task], float)
                    curves[method] = np.array(suite["env_steps"][: scores.shape[1]], float), scores
    return curves


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
            steps, values = _curve(run / "metrics.jsonl", name, x)
            label = f"{run.resolve().name}: {name}" if also else run.resolve().name
            axes.plot(steps, values, marker="o", markersize=3, label=label)
    axes.set_xlabel("environment steps" if x == "env_step" else x)
    axes.set_ylabel(metric)
    if task:
        axes.set_title(task)
    axes.grid(alpha=0.3)
    axes.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as file:
        figure.savefig(file, format="png", dpi=150)
    return out


def _curve(path: Path, metric: str, x: str) -> tuple[np.ndarray, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist, so there is nothing to plot")
    lines = list(read_metrics(path))
    points = [(line.get(x, line["step"]), line[metric]) for line in lines if metric in line]
    if not points:
        names = sorted({name for line in lines for name in line} - {"step", "time"})
        raise ValueError(f"{path} has no metric {metric!r}; it has: {', '.join(names) or 'none'}")
    steps, values = np.array(points).T
    return steps, values


def _published() -> dict[str, Any]:
    curves: dict[str, Any] = json.loads((resources.files("apv_fast.run") / "learning_curves.json").read_text())
    return curves

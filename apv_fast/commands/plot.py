"""``apv-fast plot``: learning curves of runs or of a whole experiment, published ones beside them."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from apv_fast.config import ConfigError, PlotConfig, user_settings
from apv_fast.data import atomic_file
from apv_fast.experiments.plan import Plan, load_plan
from apv_fast.run.curves import (
    CONFIDENCE,
    REPETITIONS,
    Curve,
    as_json,
    common_steps,
    published_curves,
    published_source,
    read_curve,
    summarize,
)
from apv_fast.run.plot import PAPER, plot_curves, plot_runs

ALL = "all tasks"


def plot(config: PlotConfig) -> Path:
    """Draw the picture; returns the file."""
    if not config.runs:
        raise ConfigError("runs is empty; name at least one run directory, or the folder of an experiment")
    plans = [load_plan(path) for path in config.runs]
    with user_settings():
        if plans[0] is not None and len(plans) == 1:
            path = plot_experiment(plans[0], config.out, config.metric or plans[0].metric)
        elif any(plans):
            raise ConfigError("runs has the folder of an experiment and others; plot each experiment by itself")
        else:
            path = plot_runs(config.runs, config.out, metric=config.metric or "eval_return", task=config.task)
    print(path)
    return path


def plot_experiment(plan: Plan, out: Path, metric: str) -> Path:
    """Interquartile means over seeds of every arm on every task, as the picture ``out`` and the numbers beside it.

    Raises:
        ValueError: no run has anything to draw yet.
        ImportError: rliable is not installed.
    """
    runs = _runs(plan, metric)
    tasks = {task: {arm: _joined(arm, seeds) for arm, seeds in arms.items()} for task, arms in runs.items()}
    if not tasks:
        raise ValueError(f"{plan.out}: no run has a {metric!r} yet, so there is nothing to plot")
    published = {task: _published(task) for task in tasks}
    if len(tasks) > 1:
        tasks[ALL], published[ALL] = _together(list(tasks.values())), _together(list(published.values()))
    panels = {task: curves | published[task] for task, curves in tasks.items()}
    plot_curves(panels, out, metric=metric.removeprefix("eval_"))
    content = {
        "experiment": plan.experiment,
        "size": plan.size,
        "metric": metric,
        "estimate": f"interquartile mean, {CONFIDENCE:.0%} intervals by {REPETITIONS} bootstrap samples (rliable)",
        "published": published_source(),
        "tasks": {task: as_json(curves) for task, curves in tasks.items()},
    }
    with atomic_file(out.with_suffix(".json")) as file:
        file.write((json.dumps(content) + "\n").encode())
    for task, curves in tasks.items():
        for arm, curve in curves.items():
            last = f"{curve.iqm[-1]:.4g} [{curve.low[-1]:.4g}, {curve.high[-1]:.4g}]"
            print(f"{task} {arm}: {last} after {curve.steps[-1]:.0f} environment steps, seeds: {len(curve.scores)}")
    return out


Seeds = dict[int, tuple[np.ndarray, np.ndarray]]


def _runs(plan: Plan, metric: str) -> dict[str, dict[str, Seeds]]:
    """Task, arm, seed -> steps and values, of the runs that have any yet."""
    seeds: dict[str, dict[str, Seeds]] = defaultdict(lambda: defaultdict(dict))
    for curve, run in plan.runs():
        try:
            seeds[curve.task][curve.arm][curve.seed] = read_curve(run, metric)
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)
    return seeds


def _joined(arm: str, seeds: Seeds) -> Curve:
    steps, scores = common_steps(list(seeds.values()))
    longest = max(one[-1] for one, _ in seeds.values())
    if not len(steps) or steps[-1] < longest:
        behind = min(seeds, key=lambda seed: seeds[seed][0][-1])
        print(f"{arm}: seed {behind} is behind, the curve ends where it does", file=sys.stderr)
    if not len(steps):
        raise ValueError(f"{arm}: its seeds were evaluated at different steps, so they cannot be put together")
    return summarize(steps, scores[:, None])


def _together(tasks: list[dict[str, Curve]]) -> dict[str, Curve]:
    """Each arm over all tasks, as far as it has them."""
    joined: dict[str, Curve] = {}
    for arm in tasks[0]:
        curves = [arms[arm] for arms in tasks if arm in arms]
        steps, _ = common_steps([(one.steps, one.steps) for one in curves])
        if len(curves) == len(tasks) and len(steps):
            seeds = min(len(one.scores) for one in curves)
            scores = [one.scores[:seeds, :, np.searchsorted(one.steps, steps)] for one in curves]
            joined[arm] = summarize(steps, np.concatenate(scores, axis=1))
    return joined


def _published(task: str) -> dict[str, Curve]:
    curves = published_curves(task.replace(":", "_").replace("-", "_"))
    return {PAPER + method: summarize(steps, scores[:, None]) for method, (steps, scores) in curves.items()}

"""Learning curves as numbers: read from runs, published ones, and their interquartile means over seeds.

The published curves, ``published_curves.json``, are the raw data of the official code's repository
(https://github.com/younggyoseo/apv, ``data/*.pkl``): 8 seeds a task, evaluations only.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from apv_fast.optional import optional
from apv_fast.run.metrics import read_metrics

CONFIDENCE = 0.95
REPETITIONS = 2000  # of the bootstrap


@dataclass(frozen=True)
class Curve:
    """Scores of several seeds at the same steps, and what they say together."""

    steps: np.ndarray
    """Environment steps ``[n]``."""
    scores: np.ndarray
    """``[seeds, tasks, n]``; one task unless tasks are put together."""
    iqm: np.ndarray
    """Interquartile mean over seeds and tasks ``[n]``."""
    low: np.ndarray
    """Lower end of its 95 % interval ``[n]``, by a bootstrap over seeds, stratified by task."""
    high: np.ndarray
    """Upper end."""


def read_curve(run: Path, metric: str, x: str = "env_step") -> tuple[np.ndarray, np.ndarray]:
    """``metric`` of one run over ``x`` (where a line has none, over its step): two arrays ``[n]``.

    Raises:
        ValueError: the run does not have the metric; the message names its file and the metrics that it has.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} does not exist, so there is nothing to plot")
    lines = list(read_metrics(path))
    points = [(line.get(x, line["step"]), line[metric]) for line in lines if metric in line]
    if not points:
        names = sorted({name for line in lines for name in line} - {"step", "time"})
        raise ValueError(f"{path} has no metric {metric!r}; it has: {', '.join(names) or 'none'}")
    steps, values = np.array(points).T
    return steps, values


def common_steps(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Curves of several seeds at the steps that all of them have: ``[n]`` and ``[seeds, n]``."""
    steps = functools.reduce(np.intersect1d, (one for one, _ in curves))
    return steps, np.stack([values[np.searchsorted(one, steps)] for one, values in curves])


def summarize(steps: np.ndarray, scores: np.ndarray) -> Curve:
    """Interquartile mean and its interval, by rliable.

    Args:
        steps: ``[n]``.
        scores: ``[seeds, tasks, n]``. Of 3 seeds of one task nothing is trimmed: the mean.

    Raises:
        ImportError: rliable is not installed.
    """
    library = optional("rliable.library", "interquartile means over seeds need", "plots")

    def interquartile_mean(values: np.ndarray) -> np.ndarray:
        # rliable's aggregate_iqm, of all steps at once; SciPy's trim_mean inside it takes a third of a millisecond.
        ordered = np.sort(values.reshape(-1, values.shape[-1]), axis=0)
        cut = len(ordered) // 4
        mean: np.ndarray = ordered[cut : len(ordered) - cut].mean(0)
        return mean

    state = np.random.get_state()  # rliable draws from NumPy's global generator, whatever it is given
    np.random.seed(0)
    try:
        means, intervals = library.get_interval_estimates(
            {"": scores}, interquartile_mean, reps=REPETITIONS, confidence_interval_size=CONFIDENCE
        )
    finally:
        np.random.set_state(state)
    return Curve(steps, scores, means[""], *intervals[""])


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


def published_source() -> str:
    """Where the published curves come from."""
    source: str = _published()["source"]
    return source


def _published() -> dict[str, Any]:
    curves: dict[str, Any] = json.loads((resources.files("apv_fast.run") / "published_curves.json").read_text())
    return curves


def as_json(curves: Mapping[str, Curve], digits: int = 4) -> dict[str, Any]:
    """Curves by name, as lists of rounded numbers."""
    return {
        name: {field: np.round(getattr(curve, field), digits).tolist() for field in Curve.__dataclass_fields__}
        for name, curve in curves.items()
    }

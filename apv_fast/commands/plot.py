"""``apv-fast plot``: learning curves of runs, published ones beside them."""

from __future__ import annotations

from pathlib import Path

from apv_fast.commands.common import user_settings
from apv_fast.config import ConfigError, PlotConfig
from apv_fast.run.plot import plot_runs


def plot(config: PlotConfig) -> Path:
    """Draw the picture; returns the file."""
    if not config.runs:
        raise ConfigError("runs is empty; name at least one run directory")
    with user_settings():
        path = plot_runs(config.runs, config.out, metric=config.metric, task=config.task)
    print(path)
    return path

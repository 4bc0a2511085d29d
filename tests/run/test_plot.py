"""Plots of runs, and the published curves."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from PIL import Image

from apv_fast.run import (
    Metrics,
)
from apv_fast.run.curves import published_curves
from apv_fast.run.plot import plot_runs


def test_published_curves() -> None:
    curves = published_curves("dmc_quadruped_walk")
    assert set(curves) == {"DreamerV2", "APV (Locomotion)", "APV (Manipulation)"}
    steps, scores = curves["DreamerV2"]
    assert scores.shape == (8, len(steps))
    assert steps[0] == 2000
    assert set(published_curves("metaworld_reach")) == {"DreamerV2", "APV"}
    assert published_curves("dmc_walker_walk") == {}


def test_plot(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with Metrics(tmp_path / name, tensorboard=False) as metrics:
            for step in range(3):
                metrics.scalars(step, {"eval_return": step, "env_step": 2 * step, "loss": math.nan})
    plain = plot_runs([tmp_path / "one"], tmp_path / "plots" / "plain.png")
    rich = plot_runs([tmp_path / "one", tmp_path / "two"], tmp_path / "rich.png", task="dmc_quadruped_walk")
    with Image.open(plain) as first, Image.open(rich) as second:
        assert first.format == second.format == "PNG"
        assert first.size == second.size == (1050, 675)
        assert first.tobytes() != second.tobytes()
    with pytest.raises(
        ValueError, match=r"one/metrics\.jsonl has no metric 'reward'; it has: env_step, eval_return, loss"
    ):
        plot_runs([tmp_path / "one"], tmp_path / "none.png", metric="reward")
    with pytest.raises(ValueError, match=r"three/metrics\.jsonl does not exist"):
        plot_runs([tmp_path / "three"], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()

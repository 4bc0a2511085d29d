"""Every experiment at its smallest size: videos, pre-training, fine-tuning in each arm, curves. Minutes altogether.

One task and one seed of each; a walker stands for the setups' common path, the others for their videos and worlds.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apv_fast.cli import main
from apv_fast.experiments.plan import load_plan
from apv_fast.run import read_metrics

pytest.importorskip("rliable")

ARMS = {
    "walker": ("apv", "dreamerv2", "no-pretraining"),
    "manipulation": ("no-stacking", "no-bonus"),
    "locomotion-in-domain": ("apv",),
    "locomotion-from-manipulation": ("apv",),
}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LP_NUM_THREADS", "1")


@pytest.mark.parametrize("name", ARMS)
def test_quick(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "experiment",
        name,
        "--size",
        "quick",
        "--out",
        str(tmp_path),
        "--parallel",
        "2",
        "--arms",
        *ARMS[name],
    ]
    status = main(arguments)
    logs = "\n".join(f"{path.name}:\n{path.read_text()}" for path in (tmp_path / "logs").iterdir())
    assert status == 0, logs
    assert "Warning" not in logs and "warning:" not in logs, logs
    plan = load_plan(tmp_path)
    assert plan is not None and {step.state for step in plan.steps} == {"done"}
    assert [curve.arm for curve, _ in plan.runs()] == list(ARMS[name])
    for _, run in plan.runs():
        assert any(plan.metric in line for line in read_metrics(run / "metrics.jsonl"))
    ((task, curves),) = json.loads((tmp_path / "curves.json").read_text())["tasks"].items()
    assert list(curves) == list(ARMS[name]) and all(curve["steps"] for curve in curves.values()), task
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert "all " in capsys.readouterr().out
    # Nothing is left to do: the same command starts no step.
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert f"all {len(plan.steps)} steps are done" in printed.out and "started" not in printed.err

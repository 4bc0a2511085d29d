"""Every experiment at its smallest size: videos, pre-training, fine-tuning in each arm, curves. Minutes altogether.

One task and one seed of each; a walker stands for the setups' common path, the others for their videos and worlds.
Every step is the command that a user's run has, in a process of its own for one setup; in this process for the others,
since half of a small step is importing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from apv_fast.cli import main
from apv_fast.commands import experiment
from apv_fast.experiments.plan import load_plan
from apv_fast.experiments.runner import step_command
from apv_fast.run import read_metrics

pytest.importorskip("rliable")

ARMS = {
    "walker": ("apv", "dreamerv2"),
    "manipulation": ("no-stacking", "no-bonus"),
    "locomotion-in-domain": ("apv", "no-pretraining"),
    "locomotion-from-manipulation": ("apv",),
}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LP_NUM_THREADS", "1")


class Done:
    """A step that has been run."""

    id = ""

    def __init__(self, status: int) -> None:
        self._status = status

    def poll(self) -> int:
        return self._status

    def stop(self) -> None:
        """It has."""


class HereLauncher:
    """Runs steps in this process, one after the other."""

    slots = 1

    def __init__(self, parallel: int, lock: int) -> None:
        pass

    def start(self, name: str, arguments: Sequence[str], log: Path) -> Done:
        with log.open("a") as file, redirect_stdout(file), redirect_stderr(file):
            return Done(main(step_command(arguments)[3:]))

    def find(self, job: str) -> None:
        pass


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # as where no test runs
@pytest.mark.parametrize("name", ARMS)
def test_quick(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if name != "walker":
        monkeypatch.setattr(experiment, "LocalLauncher", HereLauncher)
    arguments = ["experiment", name, "--size", "quick", "--out", str(tmp_path), "--parallel", "2"]
    arguments += ["--arms", *ARMS[name]]
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

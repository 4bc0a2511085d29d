"""Crashes, Ctrl-C and resumption: a run goes on as if nothing had happened."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from apv_fast.cli import main
from apv_fast.run import latest_checkpoint
from tests.support import ROOT
from tests.support.runs import EPISODE, FINETUNE, PRETRAIN, apv, differences, learnt, metrics_of, state_of

pytest.importorskip("dm_control")


@pytest.mark.parametrize(
    ("command", "number", "envs"),
    [
        pytest.param("pretrain", signal.SIGKILL, "", id="pretrain, kill -9"),
        pytest.param("finetune", signal.SIGKILL, "", id="finetune, kill -9", marks=pytest.mark.thorough),
        pytest.param("finetune", signal.SIGINT, "", id="finetune, Ctrl-C"),
        pytest.param(
            "finetune",
            signal.SIGKILL,
            "--overlap",
            id="finetune beside the environment, kill -9",
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            "finetune",
            signal.SIGINT,
            "--envs 2 --overlap",
            id="finetune beside two, Ctrl-C",
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            "finetune", signal.SIGINT, "--envs 2", id="finetune in two environments, Ctrl-C", marks=pytest.mark.thorough
        ),
    ],
)
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    command: str,
    number: signal.Signals,
    envs: str,
    data: Path,
    pretrained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = f"--data {data} {PRETRAIN}" if command == "pretrain" else f"--pretrained {pretrained} {FINETUNE} {envs}"
    run, reference = tmp_path / "run", tmp_path / "reference"
    endless = f"{command} {options} --out {run} --steps 1000000"
    if number == signal.SIGINT:
        interrupt(endless, run)
        done = newest_step(run)
        message = f"stopped at {done} of 1000000; go on with: apv-fast {command} --resume --out {run}\n"
        assert message in capsys.readouterr().err
    else:
        kill(endless, run)
        done = newest_step(run)
    apv(f"{command} --resume --out {run} --steps {done + 10}")  # everything else it knows
    apv(f"{command} {options} --out {reference} --steps {done + 10}")
    assert differences(learnt(run), learnt(reference)) == []
    assert metrics_of(run) == metrics_of(reference)


def interrupt(command: str, run: Path) -> None:
    """Start a run here, and interrupt it when it has some checkpoints."""
    over, end = threading.Event(), time.monotonic() + 100

    def press() -> None:
        while newest_step(run) < EPISODE and time.monotonic() < end and not over.wait(0.01):
            pass
        if not over.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    try:
        assert main(command.split()) == 130
    finally:
        over.set()
        thread.join()


def kill(command: str, run: Path) -> None:
    """Start a run in its own process, and kill it when it has some checkpoints."""
    process = subprocess.Popen(
        [sys.executable, "-m", "apv_fast.cli", *command.split()], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    try:
        end = time.monotonic() + 100
        while newest_step(run) < EPISODE:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < end, "it wrote no checkpoint"
            time.sleep(0.01)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL


def newest_step(run: Path) -> int:
    """Of the newest checkpoint; -1 if there is none."""
    path = latest_checkpoint(run / "checkpoints")
    return -1 if path is None else int(path.stem.removeprefix("step-"))


def test_resuming_what_is_complete_changes_nothing(
    finetuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finetuned, tmp_path / "run")
    apv(f"finetune --resume --out {run}")
    assert "all 50 are done already" in capsys.readouterr().err
    assert differences(state_of(finetuned), state_of(run)) == []
    assert metrics_of(run) == metrics_of(finetuned)


def test_resuming_with_other_settings(finetuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(finetuned, tmp_path / "run")
    assert main(["finetune", "--resume", "--out", str(run), "--batch", "3", "--kl.free", "2"]) == 1
    error = capsys.readouterr().err
    assert (
        f"apv-fast finetune: {run}/config.json is of another configuration: batch is 2 there and 3 now; kl.free"
        in error
    )


def test_resuming_before_the_first_checkpoint(finetuned: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(finetuned / "config.json", tmp_path / "run")
    apv(f"finetune --resume --out {tmp_path / 'run'}")
    assert differences(learnt(finetuned), learnt(tmp_path / "run")) == []

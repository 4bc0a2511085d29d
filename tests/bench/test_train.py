"""The rehearsal of a whole run: its rates, its idle share, its extrapolation, at tiny sizes."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apv_fast.config import PRESETS
from bench.gpu import train
from bench.gpu.train import Clock, check_python, covered, extrapolate, main, measure, missing, rehearse
from tests.support.learners import CORRIDOR
from tests.support.wheels import wheel

PAPER = PRESETS["metaworld"].finetune


def test_covered() -> None:
    assert covered([]) == 0
    assert covered([(4, 5), (0, 1), (0.5, 2), (1.2, 1.5), (2, 3)]) == pytest.approx(4)


def test_a_clock_counts_what_goes_on_at_the_same_time_once() -> None:
    clock = Clock(on_gpu=False)
    clock._zero = 0.0
    clock._marks = [(1.0, 2.0), (1.5, 3.0)]
    assert clock.busy() == pytest.approx(2)
    clock._marks = [(2.5, 4.0), (6.0, 7.0)]
    assert clock.busy() == pytest.approx(4)
    assert clock.busy() == pytest.approx(4)
    clock.wrap(time.sleep)(0.01)
    assert len(clock._marks) == 1 and clock.busy() >= 4.01


def test_the_extrapolation_is_the_papers_numbers_at_the_rates_found() -> None:
    figures = {"seconds": 100.0, "env_steps_per_s": 251.0, "prefill_steps_per_s": 500.0, "first_updates_per_s": 10.0}
    one = extrapolate(figures, PAPER)
    assert one["minutes_of"] == {"training": round(1000 / 60, 2), "prefill": 0.17, "first_updates": 0.17}
    assert one["minutes"] == pytest.approx(1020 / 60, abs=0.01)
    assert one["note"] == (
        "extrapolated from 100 s of training, not run: 256000 steps, 50300 updates, "
        "without start, checkpoints and evaluation"
    )
    two = extrapolate(figures | {"evaluation_steps_per_s": 250.0}, PAPER)
    assert two["minutes_of"]["evaluation"] == pytest.approx(25 * 10 * 500 / 250 / 60, abs=0.01)
    assert two["note"].endswith("without start and checkpoints")


@pytest.mark.thorough
def test_a_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one environment: the prefill, the first updates, training, a round of evaluation, told on the way."""
    monkeypatch.setattr(train, "REPORT_SECONDS", 0.2)
    told: list[dict[str, Any]] = []
    config = replace(CORRIDOR, out=Path("unused"))
    assert rehearse(config, 0.0, lambda part: None)["phase"] == "prefill", "no time, and all is imported"
    figures = rehearse(config, 8.0, lambda part: told.append(dict(part)))
    assert told[0].keys() == {"envs", "overlap", "precision", "device", "start_s"}
    assert figures == told[-1] and len(told) > 4
    assert figures["phase"] == "training" and 0 < figures["seconds"] < 8
    assert figures["env_steps_per_s"] > figures["updates_per_s"] > 0 and 0 <= figures["idle_share"] <= 1
    assert figures["env_steps_per_s"] == pytest.approx(5 * figures["updates_per_s"], rel=0.3), "an update in 5 steps"
    assert figures["evaluation_steps_per_s"] > 0 and figures["extrapolation"]["minutes"] > 0
    assert all("extrapolation" in one for one in told if one.get("phase") == "training" and "env_steps_per_s" in one)


def test_idle_is_what_nobody_computes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support.corridor import Corridor

    step = Corridor.step

    def slow(env: Corridor, action: Any) -> Any:
        time.sleep(0.1)
        return step(env, action)

    monkeypatch.setattr(Corridor, "step", slow)
    figures = rehearse(replace(CORRIDOR, out=Path("unused"), overlap=False), 12.0, lambda part: None)
    assert figures["idle_share"] > 0.5


@pytest.mark.slow
def test_the_process(tmp_path: Path) -> None:
    """On Meta-world, in a process of its own."""
    pytest.importorskip("metaworld")
    told: list[dict[str, Any]] = []
    figures = measure(150.0, told.append, wheels=tmp_path / "none")  # starting takes 10 s, or 100 on a busy machine
    assert told and figures["envs"] == 2 and figures["device"] in ("cpu", "cuda") and "env_steps_per_s" in figures


def test_what_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "metaworld" else find(name))
    assert missing() == ["metaworld"]
    assert main([]) == 1
    assert json.loads(capfd.readouterr().out) == {"missing": ["metaworld"]}
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho \'{"missing": ["mujoco", "tyro"]}\'\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    told: list[dict[str, Any]] = []
    with pytest.raises(ImportError, match=r"needs mujoco, tyro: make wheels/ with python -m bench\.gpu\.wheels"):
        measure(1.0, told.append, wheels=tmp_path / "none")
    program.write_text("#!/bin/sh\necho '{\"envs\": 2}'\necho 'it broke' >&2\nexit 3\n")
    with pytest.raises(RuntimeError, match="train ended with status 3: it broke"):
        measure(1.0, told.append, wheels=tmp_path / "none")
    assert told == [{"envs": 2}]


def program(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell script in the place of Python."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def test_a_process_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its time and a grace; what it has told is there."""
    program(tmp_path, "echo '{\"envs\": 2}'\nexec sleep 60", monkeypatch)
    monkeypatch.setattr(train, "GRACE_SECONDS", 0.5)
    told: list[dict[str, Any]] = []
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="train ended with status 124"):
        measure(0.5, told.append, wheels=tmp_path / "none")
    assert told == [{"envs": 2}] and 0.9 < time.monotonic() - begin < 20


def test_wheels_come_before_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(tmp_path / "wheels")
    program(tmp_path, """printf '{"path": "%s", "arguments": "%s"}\\n' "$PYTHONPATH" "$*\"""", monkeypatch)
    monkeypatch.setattr(train, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    figures = measure(3.0, lambda part: None, wheels=tmp_path / "wheels")
    site, *rest = figures["path"].split(":")
    assert (Path(site) / "toy" / "__init__.py").exists() and "/elsewhere" in rest
    assert figures["arguments"] == "-m bench.gpu.train --seconds 3.0"


def test_on_a_gpu_it_is_the_papers_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the number of environments, bfloat16 and the overlap."""
    for cores, envs in ((16, 12), (8, 6), (2, 2)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)))
        config = train.configuration(True)
        assert (config.envs, config.overlap, config.model.precision) == (envs, True, "bf16")
        same = replace(config, env=PAPER.env, envs=PAPER.envs, overlap=PAPER.overlap, model=PAPER.model)
        assert same == PAPER
        assert replace(config.model, precision=PAPER.model.precision) == PAPER.model
    tiny = train.configuration(False)
    assert (tiny.env, tiny.envs, tiny.overlap) == (config.env, 2, True) and tiny.model.deter == 8


def test_wheels_for_another_python(tmp_path: Path) -> None:
    (tmp_path / "toy-1.0-cp310-abi3-manylinux_2_28_x86_64.whl").touch()
    check_python(tmp_path)
    (tmp_path / "toy-1.0-cp36-cp36m-manylinux_2_28_x86_64.whl").touch()
    with pytest.raises(ImportError, match=r"is for another Python than cp3\d+: toy-1\.0-cp36"):
        check_python(tmp_path)

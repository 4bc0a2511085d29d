"""Running a plan: order, width, failures, Ctrl-C, a killed runner, the share of each step in the machine."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from apv_fast.experiments import local
from apv_fast.experiments.local import LocalLauncher
from apv_fast.experiments.plan import Plan, PlanError, Step, load_plan
from apv_fast.experiments.runner import INTERRUPTED, Runner, folder_lock, last_line, step_command

# What a step does is its first argument.
CHILD = """
import signal, sys, time
from pathlib import Path
what, out = sys.argv[1], Path(sys.argv[2])
def stop(*_):
    print("saved", flush=True)
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
print("hello from", what, flush=True)
if what == "wait":
    out.touch()
    time.sleep(30)
if what == "fail":
    sys.exit("out of luck")
out.touch()
"""


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LocalLauncher:
    """Two at a time; runs ``CHILD`` instead of apv-fast."""
    monkeypatch.setattr(local, "step_command", lambda arguments: [sys.executable, "-c", CHILD, *arguments])
    descriptor = os.open(tmp_path / "lock", os.O_CREAT | os.O_RDWR)
    return LocalLauncher(2, descriptor)


def _plan(out: Path, *steps: tuple[str, str, tuple[str, ...]]) -> Plan:
    """Steps of (name, what it does, what it needs)."""
    return Plan(
        "x", "quick", out, "m", [Step(name, (does, "{out}/" + name), name, needs) for name, does, needs in steps]
    )


def _run(plan: Plan, launcher: LocalLauncher, file: io.StringIO | None = None) -> tuple[dict[str, str], str]:
    """States and output."""
    file = file or io.StringIO()
    Runner(plan, launcher, file=file, interval_s=0.1).run()
    saved = load_plan(plan.out)
    assert saved == plan
    return {step.name: step.state for step in plan.steps}, file.getvalue()


def test_steps_run_in_order_and_a_failure_stops_only_what_needs_it(tmp_path: Path, launcher: LocalLauncher) -> None:
    plan = _plan(
        tmp_path,
        ("a", "ok", ()),
        ("b", "fail", ()),
        ("after-a", "ok", ("a",)),
        ("after-b", "ok", ("b",)),
        ("after-both", "ok", ("after-a", "b")),
    )
    states, printed = _run(plan, launcher)
    assert states == {"a": "done", "b": "failed", "after-a": "done", "after-b": "waiting", "after-both": "waiting"}
    assert f"/5 done] b: failed after 0.0 minutes with status 1, see {tmp_path}/logs/b.log: out of luck" in printed
    order = [line.split(": ")[0].split()[-1] for line in printed.splitlines() if "started" in line]
    assert order == ["a", "b", "after-a"]
    assert printed.index("a: done") < printed.index("after-a: started")
    # Again: only what is not done.
    again = _plan(tmp_path, ("a", "ok", ()), ("b", "fail", ()), ("after-a", "ok", ("a",)))
    again.go_on_from(plan)
    _, printed = _run(again, launcher)
    assert [line.split(": ")[0].split()[-1] for line in printed.splitlines() if "started" in line] == ["b"]
    assert (tmp_path / "logs" / "b.log").read_text().count("hello from fail") == 2


def test_no_more_at_a_time_than_there_are_slots(tmp_path: Path) -> None:
    running: set[str] = set()
    widths: list[int] = []

    class Job:
        id = "7"

        def __init__(self, name: str) -> None:
            self.name, self.polls = name, 0
            running.add(name)
            widths.append(len(running))

        def poll(self) -> int | None:
            self.polls += 1
            if self.polls < 2:
                return None
            running.discard(self.name)
            return 0

        def stop(self) -> None:
            raise AssertionError

    class Launcher:
        slots = 3

        def start(self, name: str, arguments: Sequence[str], log: Path) -> Job:
            return Job(name)

        def find(self, job: str) -> Job | None:
            return None

    plan = _plan(tmp_path, *((f"s{index}", "ok", ()) for index in range(7)))
    Runner(plan, Launcher(), file=io.StringIO()).run()
    assert max(widths) == 3 and widths.count(3) > 1
    assert all(step.state == "done" and step.job == "" for step in plan.steps)


def _wait(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


def test_ctrl_c_lets_every_step_save(
    tmp_path: Path, launcher: LocalLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = _plan(tmp_path, ("one", "wait", ()), ("two", "wait", ()), ("three", "ok", ()))

    file = io.StringIO()

    def interrupt() -> None:
        for name in ("one", "two"):
            _wait(tmp_path / name)
        deadline = time.monotonic() + 20
        while file.getvalue().count("hello from wait") < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    states, printed = _run(plan, launcher, file)
    thread.join()
    assert states == {"one": "interrupted", "two": "interrupted", "three": "waiting"}
    for name in ("one", "two"):
        assert (tmp_path / "logs" / f"{name}.log").read_text().splitlines()[-1] == "saved"
        assert f"{name}: hello from wait" in printed, "progress while it runs"
    assert "stopping at the next safe point" in capsys.readouterr().err


def test_a_runner_that_breaks_does_not_leave_its_steps_behind(
    tmp_path: Path, launcher: LocalLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = _plan(tmp_path, ("one", "wait", ()))
    runner = Runner(plan, launcher, file=io.StringIO())

    def full(step: Step) -> None:
        _wait(tmp_path / "one")
        raise OSError("disk full")

    monkeypatch.setattr(runner, "_poll", full)
    with pytest.raises(OSError, match="disk full"):
        runner.run()
    process = launcher._jobs[0]
    assert process is not None
    pid = process._process.pid
    assert os.getsid(pid) == pid, "the terminal's Ctrl-C must not reach it beside the runner's"
    assert process._process.wait(10) == INTERRUPTED
    assert plan["one"].state == "running", "so the next runner runs it again"
    later = _plan(tmp_path, ("one", "ok", ()))
    later.steps[0].state = "running"
    assert _run(later, launcher)[0] == {"one": "done"}


@pytest.mark.usefixtures("launcher")  # for what a step is
def test_one_runner_a_folder_and_its_steps_keep_others_out(tmp_path: Path) -> None:
    with folder_lock(tmp_path) as descriptor:
        with pytest.raises(PlanError, match="another process runs steps there"), folder_lock(tmp_path):
            pass
        child = LocalLauncher(1, descriptor).start("one", ("wait", str(tmp_path / "one")), tmp_path / "log")
    try:  # the runner is gone, its step is not
        with pytest.raises(PlanError, match="steps of a killed one still run"), folder_lock(tmp_path):
            pass
    finally:
        _wait(tmp_path / "one")
        child.stop()
        while child.poll() is None:
            time.sleep(0.02)
    with folder_lock(tmp_path):
        pass


def test_the_machine_is_shared(launcher: LocalLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(10)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name in ("OMP_NUM_THREADS", "LP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    assert launcher._environment(1) == {"OMP_NUM_THREADS": "5", "LP_NUM_THREADS": "5", "CUDA_VISIBLE_DEVICES": "1"}
    assert "CUDA_VISIBLE_DEVICES" not in LocalLauncher(1, 0)._environment(0), "one step may use them all"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    eight = LocalLauncher(20, 0)
    assert [eight._environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1, 2)] == ["6", "7", "6"]
    assert "OMP_NUM_THREADS" not in eight._environment(0), "the user's choice holds"
    assert eight._environment(0)["LP_NUM_THREADS"] == "1"


def test_a_run_that_began_goes_on(tmp_path: Path) -> None:
    arguments = ("finetune", "--env", "e", "--out", str(tmp_path / "run"))
    assert step_command(arguments) == [sys.executable, "-m", "apv_fast.cli", *arguments]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").touch()
    assert step_command(arguments)[-1] == "--resume"
    assert "--resume" not in step_command(("collect", *arguments[1:])), "it always goes on"


def test_last_line(tmp_path: Path) -> None:
    assert last_line(tmp_path / "none") == ""
    (tmp_path / "log").write_text("first\n" + 1000 * "é" + "\nlast: 3/5 \n\n")
    assert last_line(tmp_path / "log") == "last: 3/5"
    assert last_line(tmp_path / "log", size=32).startswith("last")

"""The jobs of ``python -m bench.device``: work in another process, which may fail, hang or die."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bench", reason="bench/ is not installed; it runs from a checkout")
from bench.gpu.checkout import ROOT, environment
from bench.gpu.jobs import Job, Outcome, Worker, run_to_the_end, run_together

FAKE = """
import os, sys, time
def run(kind, arguments, tell):
    stage = tell.stage
    if kind == "echo":
        print("noise on the output")
        return arguments
    if kind == "raise":
        raise ValueError("what\\nwhere")
    if kind == "fatal":
        stage("bad")
        raise RuntimeError("CUDA error: an illegal memory access")
    if kind == "pid":
        return os.getpid()
    if kind == "contest":
        for name in arguments["names"]:
            if name in arguments["without"]:
                continue
            stage(name)
            tell.item({"at": name})
            if name == "hangs":
                time.sleep(60)
            if name == "dies":
                print("last words", file=sys.stderr)
                os._exit(7)
            if arguments.get("one by one"):
                tell.finished(name)
        return [name for name in arguments["names"] if name not in arguments["without"]]
"""


@pytest.fixture
def worker(tmp_path: Path) -> Any:
    (tmp_path / "fake_jobs.py").write_text(FAKE)
    with Worker("fake_jobs", tmp_path / "log", environment(PYTHONPATH=str(tmp_path))) as child:
        yield child


def test_a_job_returns_its_result(worker: Worker) -> None:
    outcome = worker.run(Job("a", "echo", {"x": [1, 2]}))
    assert (outcome.result, outcome.error) == ({"x": [1, 2]}, "")
    assert "noise on the output" in worker.log.read_text()


def test_an_error_costs_one_job_and_not_the_process(worker: Worker) -> None:
    before = worker.run(Job("a", "pid")).result
    outcome = worker.run(Job("b", "raise"))
    assert (outcome.result, outcome.error, outcome.culprit) == (None, "ValueError: what", "")
    assert worker.run(Job("c", "pid")).result == before


def test_a_broken_context_costs_the_process(worker: Worker) -> None:
    before = worker.run(Job("a", "pid")).result
    outcome = worker.run(Job("b", "fatal"))
    assert outcome.error.startswith("RuntimeError: CUDA error") and outcome.culprit == "bad"
    assert worker.run(Job("c", "pid")).result not in (before, None)


def test_a_hang_is_stopped_and_named(worker: Worker) -> None:
    start = time.monotonic()
    job = Job("a", "contest", {"names": ["fine", "hangs"], "without": []}, seconds=1.5)
    outcome = worker.run(job)
    assert time.monotonic() - start < 15
    assert (outcome.error, outcome.culprit) == ("took more than 2 s", "hangs")
    assert worker.run(Job("b", "echo", {})).result == {}


def test_last_words_of_a_process_that_dies(worker: Worker) -> None:
    outcome = worker.run(Job("a", "contest", {"names": ["dies"], "without": []}))
    assert "exit status 7" in outcome.error and "last words" in outcome.error


def test_a_contest_goes_on_without_who_broke_it(worker: Worker) -> None:
    names = ["one", "dies", "hangs", "two"]
    job = Job("a", "contest", {"names": names}, seconds=2.0)
    outcome, broken = run_to_the_end(worker, job, until=time.monotonic() + 60)
    assert outcome.result == ["one", "two"]
    assert list(broken) == ["dies", "hangs"]
    assert "took more than" in broken["hangs"]


def test_what_was_told_is_kept_and_not_done_again(worker: Worker) -> None:
    job = Job("a", "contest", {"names": ["one", "dies", "two", "hangs", "three"], "one by one": True}, 60.0, 1.0)
    told: list[str] = []
    outcome, broken = run_to_the_end(
        worker, job, until=time.monotonic() + 60, on_item=lambda item: told.append(item["at"])
    )
    assert told == ["one", "dies", "two", "hangs", "three"]  # nobody twice
    assert list(broken) == ["dies", "hangs"] and broken["hangs"] == "took more than 1 s"
    assert outcome.error == "" and outcome.finished == ["three"]


def test_jobs_side_by_side(tmp_path: Path) -> None:
    """Each in a child of its own; one that hangs costs the others nothing; the time ends all."""
    (tmp_path / "fake_jobs.py").write_text(FAKE)

    def make(number: int) -> Worker:
        return Worker("fake_jobs", tmp_path / f"log{number}", environment(PYTHONPATH=str(tmp_path)))

    slow = [Job(f"slow {i}", "contest", {"names": ["hangs"], "without": []}, 60.0) for i in range(2)]
    quick = [Job(f"quick {i}", "pid") for i in range(4)]
    outcomes: list[Outcome] = []
    start = time.monotonic()
    jobs = [slow[0], *quick, slow[1], Job("late", "pid")]
    left = run_together(make, jobs, 2, until=start + 4.0, ended=outcomes.append)
    assert time.monotonic() - start < 30
    errors = {one.job: one.error for one in outcomes}
    assert all(errors[job.name] == "" for job in quick)
    assert all("took more than" in errors[job.name] for job in slow)
    assert left == ["late"]


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    """Also one whose job never ends."""
    (tmp_path / "fake_jobs.py").write_text(FAKE)
    code = f"""
from pathlib import Path
from bench.gpu.checkout import environment
from bench.gpu.jobs import Job, Worker
worker = Worker("fake_jobs", Path({str(tmp_path / "log")!r}), environment(PYTHONPATH={str(tmp_path)!r}))
print(worker.run(Job("a", "pid")).result, flush=True)
worker.run(Job("b", "contest", {{"names": ["hangs"], "without": []}}), lambda item: print(item, flush=True))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = Path("/proc", process.stdout.readline().strip())
    assert "hangs" in process.stdout.readline() and child.exists()
    process.kill()
    process.wait()
    end = time.monotonic() + 30
    while child.exists() and time.monotonic() < end and (child / "stat").read_text().split()[2] != "Z":
        time.sleep(0.05)
    assert not child.exists() or (child / "stat").read_text().split()[2] == "Z"


def test_nothing_is_begun_again_when_the_time_is_up(worker: Worker) -> None:
    job = Job("a", "contest", {"names": ["hangs"]}, seconds=60.0)
    outcome, broken = run_to_the_end(worker, job, until=time.monotonic() + 2)
    assert outcome.error and broken == {}


def test_a_module_that_cannot_be_imported_is_an_outcome(tmp_path: Path) -> None:
    with Worker("no_such_module", tmp_path / "log") as broken:
        outcome = broken.run(Job("a", "echo"))
    assert "did not start" in outcome.error and "No module named 'no_such_module'" in outcome.error

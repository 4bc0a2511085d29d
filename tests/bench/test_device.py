"""``python -m bench.device`` as a whole, without a GPU: its time, its stages, and what it does with outcomes."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("bench", reason="bench/ is not installed; it runs from a checkout")
from bench import device, timing
from bench.gpu import build, stages, suite
from bench.gpu.checkout import ROOT
from bench.gpu.jobs import Job, Outcome
from bench.gpu.ledger import SECTIONS, Clock, Ledger
from bench.gpu.stages import Stages

CPU = torch.device("cpu")


def test_stages_share_the_time() -> None:
    clock = Clock(430.0, start=100.0)
    ends = [clock.until(name) - 100.0 for name in SECTIONS]
    assert ends == [80.0, 170.0, 179.0, 279.0, 407.0, 430.0]
    assert Clock(43.0, start=0.0).until("core") == pytest.approx(17.0)
    alone = Clock(300.0, ("core",), start=0.0)
    assert alone.until("core") == 300.0 and alone.until("tests") == 300.0


def test_the_clock_starts_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes before the first stage, reading the command line included, is taken from the run's time."""
    began: list[float] = []

    def parse(arguments: object) -> argparse.Namespace:
        time.sleep(0.2)
        began.append(time.monotonic())
        return argparse.Namespace(json=None, sections=SECTIONS, only="", seconds=430.0, sanitize=False)

    def look(seconds: float = 0.0) -> build.Probe:
        raise RuntimeError("enough")

    clocks: list[Clock] = []

    def make() -> Clock:
        clocks.append(Clock())
        return clocks[0]

    monkeypatch.setattr(device, "parse", parse)
    monkeypatch.setattr(build, "look", look)
    monkeypatch.setattr(device, "Clock", make)
    assert device.main([]) == 1
    assert clocks[0].start < began[0] - 0.1


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(build, "look", lambda seconds=0.0: build.Probe("", library=True))
    monkeypatch.setattr(build, "build", lambda probe, log, seconds: {"seconds": 1.0, "nvcc": "release 13.0"})
    monkeypatch.setattr(device, "compile_kernels", lambda log, seconds: "")
    monkeypatch.setattr(device, "ROOT", tmp_path)
    monkeypatch.delenv("OUT", raising=False)
    return tmp_path


def test_without_a_gpu_nothing_is_measured(
    no_work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert device.main([]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == device.NO_GPU
    assert not list(no_work.rglob("*.json"))
    monkeypatch.setattr(device, "compile_kernels", lambda log, seconds: "spills")
    assert device.main([]) == 1
    out = capsys.readouterr().out
    assert "BROKEN Triton kernels: spills" in out and out.splitlines()[-1] == device.NO_GPU

    def late(log: Path, seconds: float) -> str:
        raise TimeoutError("not all of them in 9 s")

    monkeypatch.setattr(device, "compile_kernels", late)
    assert device.main([]) == 0
    assert "not run: Triton kernels: not all of them in 9 s" in capsys.readouterr().out


def test_pytorch_that_does_not_work(no_work: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(build, "LOOK", "raise ImportError('libcudart is missing')")
    assert device.main([]) == 1
    assert "BROKEN PyTorch: ImportError: libcudart is missing" in capsys.readouterr().out
    monkeypatch.setattr(build, "LOOK", "import time; time.sleep(60)")
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="no answer in 0 s"):
        build.look(0.3)
    assert time.monotonic() - start < 20


def play(out: Path, *arguments: str) -> subprocess.Popen[str]:
    """The whole command with the child of :mod:`tests.support.device_child`."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.device_child", *arguments], cwd=ROOT, env={**os.environ, "OUT": str(out)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def played(out: Path, *arguments: str) -> tuple[dict[str, Any], str, int]:
    process = play(out, *arguments)
    text, _ = process.communicate(timeout=120)
    assert (out / "device.json").exists(), text
    return json.loads((out / "device.json").read_text()), text, process.returncode


EVERYTHING = {(op, name) for op in ("rssm_observe", "lambda_return") for name in ("cuda", "triton", "reference")}
EVERYTHING |= {(op, name) for op in ("rssm_observe", "lambda_return") for name in ("first rival", "last rival")}
EVERYTHING |= {("lambda_return", "slow rival")}


def test_whole_run(tmp_path: Path) -> None:
    """A rival that hangs and one that dies cost their own rows only."""
    content, out, status = played(tmp_path)
    assert status == 1 and content["complete"]
    assert {(row["op"], row["backend"]) for row in content["rows"]} == EVERYTHING
    assert len(content["rows"]) == 2 * (2 * 5 + 6)
    assert content["machine"]["GPU"] == "A GPU that is not there"
    assert content["ceilings"]["barrier_us"] == 1.2 and content["ceilings"]["sms"] == 132
    assert content["train"] == {"updates": 10, "updates_per_s": 20.0}
    assert content["tests"]["passed"] == 1
    assert "error" not in content["smoke"]["fine"] and "too large" in content["smoke"]["wrong"]["error"]
    assert content["problems"] == {"wrong": "AssertionError: an error is too large"}  # no rival's fault is one
    lost = content["left_out"]
    assert "took more than" in lost["observe 16: slow rival"] and "exit status 7" in lost["returns: rival that dies"]
    assert content["not_run"]["1 of 2 tests"] == "their time was up"
    assert "BROKEN wrong" in out and "forecast (not measured on a GPU)" in out
    from bench import roofline

    assert roofline.main(["--measured", str(tmp_path / "device.json")]) == 0  # reads what this wrote


@pytest.mark.parametrize("name", SECTIONS)
def test_each_stage_is_a_call_of_its_own(name: str, tmp_path: Path) -> None:
    content, _, status = played(tmp_path, "--sections", name, "--only", "observe 16")
    field = {"core": "rows", "rivals": "rows"}.get(name, name)
    filled = {field for field in ("smoke", "rows", "train", "tests") if content[field]}
    assert filled == ({field} if name != "ceilings" else set())
    assert ("copy_x" in content["ceilings"]) == (name == "ceilings")
    others = {other: why for other, why in content["not_run"].items() if other in SECTIONS}
    assert others == dict.fromkeys(set(SECTIONS) - {name}, "not asked for")
    assert status == (1 if name == "smoke" else 0)
    backends = {row["backend"] for row in content["rows"]}
    assert backends == {"core": {"cuda", "triton", "reference"}, "rivals": {"first rival", "last rival"}}.get(
        name, set()
    )


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def measured(content: dict[str, Any]) -> set[str]:
    """Everything of a report that a later state of it must still have."""
    kept = {f"{row['op']} {row['shape']} {row['pass']} {row['backend']}" for row in content["rows"]}
    return kept | {f"{field} {name}" for field in ("smoke", "ceilings", "train", "left_out") for name in content[field]}


def test_killed_at_any_second(tmp_path: Path) -> None:
    """The file is whole at any time and only gains; a run that is killed leaves it so, and no child."""
    states: list[dict[str, Any]] = []
    random.seed(0)
    # After so many changes of the file, and a moment: whatever the machine's load, at any place of a run.
    for turn, changes in enumerate([1000, *(random.randrange(60) for _ in range(7))]):
        out = tmp_path / str(turn)
        process = play(out)
        before, text, seen = set[str](), "", 0
        while seen < changes and process.poll() is None:
            path = out / "device.json"
            if path.exists() and path.read_text() != text:
                text, seen = path.read_text(), seen + 1
                now = json.loads(text)  # whole
                assert before <= measured(now)
                before = measured(now)
            time.sleep(0.005)
        time.sleep(random.uniform(0.0, 0.05))
        known = children(process.pid) if process.poll() is None else []
        process.kill()
        process.wait()
        if (out / "device.json").exists():
            content = json.loads((out / "device.json").read_text())
            assert before <= measured(content)
            states.append(content)
        deadline = time.monotonic() + 60
        while not all(map(gone, known)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert all(map(gone, known))
    assert states[0]["complete"]
    stopped = [state for state in states if not state["complete"]]
    assert any(state["rows"] for state in stopped)  # some were killed between two rows
    for state in stopped:
        assert "the run ended" in " ".join(state["not_run"].values())


def test_a_slow_rival_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it hangs: what was measured before is there, of its own contest too, and no child is left."""
    monkeypatch.setenv("CONTESTANT_SECONDS", "600")  # it hangs for longer than all else takes
    process = play(tmp_path, "--only", "observe 16")
    path, end = tmp_path / "device.json", time.monotonic() + 100
    content: dict[str, Any] = {"rows": []}
    while time.monotonic() < end and not any(row["backend"] == "first rival" for row in content["rows"]):
        time.sleep(0.02)
        content = json.loads(path.read_text()) if path.exists() else content
    known = children(process.pid)
    process.kill()
    process.wait()
    content = json.loads(path.read_text())
    assert {row["backend"] for row in content["rows"]} == {"cuda", "triton", "reference", "first rival"}
    assert content["left_out"] == {}  # nobody has been given up by then
    assert not content["complete"] and content["not_run"]["rivals"] == "the run ended while it was at work"
    end = time.monotonic() + 60
    while not all(map(gone, known)) and time.monotonic() < end:
        time.sleep(0.05)
    assert known and all(map(gone, known))


@pytest.mark.parametrize("sections", [("smoke",), ("core",)])
def test_smoke_takes_a_minute_at_most(
    sections: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it has the whole time to itself; without its checks too. What is timed later compiles beside them."""
    ends: list[float] = []
    begun: list[str] = []

    def together(make: object, jobs: list[Job], count: int, *, until: float, ended: Any) -> list[str]:
        ends.append(until - time.monotonic())
        begun.extend(job.name for job in jobs)
        return [job.name for job in jobs]

    monkeypatch.setattr(stages, "run_together", together)
    clock = Clock(4300.0, sections)
    ran = Stages(Ledger(None, {}, clock), sections, tmp_path, tmp_path)
    ran.contests = [
        {"name": "this", "target": True, "rivals": True},
        {"name": "that", "target": False, "rivals": False},
    ]
    monkeypatch.setattr(ran.worker, "run", lambda job: Outcome(job.name, ["a check"]))
    ran._section("smoke" if "smoke" in sections else stages.WARM_UP, ran.smoke)
    assert len(ends) == 1 and 50.0 < ends[0] <= 60.0
    core = ["core of this, part 1"]
    rivals = [f"rivals of this, part {turn}" for turn in range(1, stages.TURNS + 1)]
    assert begun == (["a check", *core, *rivals] if sections == ("smoke",) else core)
    # What could not compile in time is compiled where it is timed; what could not be checked is said.
    assert set(ran.ledger.report["not_run"]) == ({"a check"} if sections == ("smoke",) else set())


def test_what_is_worth_most_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, and timed: what there is no time for at the end is worth least."""
    kinds = {"d": (False, False), "b": (True, False), "a": (True, True), "c": (True, False)}
    contests = [{"name": name, "target": target, "rivals": rivals} for name, (target, rivals) in kinds.items()]
    jobs = stages.compilations(contests, ("core", "rivals"))
    order = list(dict.fromkeys(f"{job.arguments['who']} {job.arguments['contest']}" for job in jobs))
    assert order == ["core a", "rivals a", "core b", "core c", "rivals b", "rivals c"]
    assert len({job.name for job in jobs}) == len(jobs) == 3 + 3 * stages.TURNS
    parts = [job.arguments for job in jobs if (job.arguments["who"], job.arguments["contest"]) == ("rivals", "a")]
    assert [(part["turn"], part["of"]) for part in parts] == [(turn, stages.TURNS) for turn in range(stages.TURNS)]
    ran = Stages(Ledger(None, {}, Clock()), SECTIONS, tmp_path, tmp_path)
    ran.contests, timed = contests, list[str]()
    monkeypatch.setattr(ran, "_contest", lambda kind, one, until: timed.append(f"{kind} {one['name']}"))
    ran.rivals(0.0)
    assert timed == ["rivals a", "rivals b", "rivals c", "core d", "rivals d"]


def test_no_time_is_no_fault(tmp_path: Path) -> None:
    content, _, status = played(tmp_path, "--sections", "core,rivals", "--seconds", "0")
    assert status == 0 and content["rows"] == []
    assert content["not_run"]["core"] == content["not_run"]["rivals"] == "no time left"


def test_sections_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        device.main(["--sections", "nonsense"])
    assert "must be some of" in capsys.readouterr().err


def test_a_failed_test_is_a_problem(tmp_path: Path) -> None:
    ledger = Ledger(None, {}, Clock())
    failed: dict[str, Any] = {"test": "f::a", "outcome": "failed", "seconds": 1.0, "why": "wrong"}
    summary = suite.summary([{"part": []}, {"part": []}, {"collected": 1}, failed]) | {"stopped": False, "status": 1}
    Stages(ledger, SECTIONS, tmp_path, tmp_path)._judge("tests", summary)
    assert ledger.report["problems"] == {"tests": "1 failed"} and ledger.report["not_run"] == {}


def test_warm_and_cold_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm, the same work runs just before the run that is timed."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = -1

        def record(self) -> None:
            calls.append("event")

        def synchronize(self) -> None:
            return None

        def elapsed_time(self, end: Event) -> float:
            return 1.0

    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    properties = type("P", (), {"L2_cache_size": 16})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for cold, expected in ((True, "event work event"), (False, "work event work event")):
        calls.clear()
        assert timing._CudaClock(CPU, cold=cold)(lambda: calls.append("work")) == 1.0
        assert " ".join(calls) == expected

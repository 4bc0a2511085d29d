"""``python -m bench.device`` as a whole, without a GPU: targets, the table, what it does with outcomes."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("bench", reason="bench/ is not installed; it runs from a checkout")
from bench import device, timing
from bench.cost.machine import MACHINES
from bench.gpu import build, suite, table, targets
from bench.gpu.jobs import Job, Outcome, run_to_the_end
from bench.gpu.ledger import Ledger

CPU = torch.device("cpu")

# Targets and the table


def row(op: str, backend: str, ms: float, passed: str = "forward_backward", **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "op": op,
        "backend": backend,
        "dtype": "bfloat16",
        "shape": {"B": 16, "T": 50},
        "pass": passed,
    }
    found |= {"median_ms": ms, "p10_ms": ms, "p90_ms": ms, "runs": 9, "baseline_ratio": None, "cache": "cold"}
    return found | {"peak_mb": None} | more


def test_targets_are_held_against_the_fastest_of_ours() -> None:
    rows = [
        row("rssm_observe", "cuda", 0.5, "forward"),
        row("rssm_observe", "triton", 0.7, "forward"),
        row("rssm_observe", "reference", 9.9, "forward"),
        row("rssm_observe", "torch.compile in a graph", 1.25, "forward"),
        row("rssm_observe", "triton, a launch a phase", 0.1, "forward"),  # no claim is about it
        row("stacked_observe", "triton", 2.0),
        row("stacked_observe", "two scans, triton", 3.1),
    ]
    paper = {"B": 50, "T": 50}
    rows += [row("finetune_update", "auto", 30.0, peak_mb=500.0, shape=paper)]
    rows += [row("finetune_update", "reference", 300.0, peak_mb=1000.0, shape=paper)]
    rows += [row("pretrain_update", "auto, without a graph", 3.0)]  # where a graph cannot be recorded
    found = {v.what: (v.measured, v.met) for v in targets.verdicts(rows)}
    assert found["observe B=16 forward"] == ("0.500 ms", True)
    assert found["observe B=16 forward over eager"] == ("19.80 x", False)
    assert found["observe B=16 forward over compile"] == ("2.50 x", True)
    assert found["observe B=50 forward"] == ("not measured", None)
    assert found["stacked B=16 over two scans"] == ("1.55 x", True)
    assert found["fine-tuning update B50 T50"] == ("30.000 ms", False)
    assert found["fine-tuning update over eager"] == ("10.00 x", True)
    assert found["fine-tuning peak memory of eager's"] == ("50% (500 MB)", True)
    assert found["pre-training update B16 T25"] == ("3.000 ms", True)
    assert found["pre-training peak memory of eager's"] == ("not measured", None)


def report(**more: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"machine": {"GPU": "NVIDIA H100"}, "build": {}, "tests": {}, "ceilings": {}, "rows": []}
    return made | {"left_out": {}, "problems": {}, "not_run": {}} | more


def test_table_names_what_was_measured_and_what_was_not() -> None:
    shape = {"B": 16, "T": 50, "E": 1536, "A": 0, "deter": 1024, "hidden": 1024, "stoch": 32, "discrete": 32}
    rows = [
        row("rssm_observe", "cuda", 0.866, "forward", shape=shape),
        row("rssm_observe", "reference", 17.32, "forward", shape=shape),
        row("rssm_observe", "cuDNN LSTM float16", 0.2, "forward", shape=shape),
    ]
    text = table.render(report(rows=rows, not_run={"knn_bonus": "no time left"}), MACHINES["h100"])
    line = next(line for line in text.splitlines() if line.startswith("rssm_observe"))
    assert line.split()[:9] == ["rssm_observe", "B=16", "T=50", "bfloat16", "f", "0.866", "0.866", "62%", "cuda"]
    assert "20.0x" in line and "cuDNN LSTM float16 0.200" in line
    assert "not run: knn_bonus: no time left" in text
    assert "NOT MET" in text  # 0.6 ms
    assert "tests: not run" in text


def test_table_is_short_whatever_happened() -> None:
    ops_ = [f"op{i}" for i in range(80)]
    many = {f"what {i}": "why " * 90 for i in range(90)}
    tests = suite.summary([{"test": str(i), "outcome": "failed", "seconds": 1.0, "why": "x" * 400} for i in range(99)])
    rows = [row(op, "triton", 1.0) for op in ops_]
    whole = report(rows=rows, problems=many, left_out=many, not_run=many, tests=tests | {"seconds": 9.0})
    text = table.render(whole, MACHINES["h100"])
    assert len(text.splitlines()) < 60 and len(text) < 12_000
    assert "99 failed" in text and text.splitlines()[-1].endswith("see the JSON file")
    assert "observe B=16 forward over eager" in text and "op0" in text  # targets and the first results are there


def test_ledger_counts_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    ledger = Ledger(50.0, start=100.0)
    assert ledger.left() == 50.0 and ledger.left(ledger.until(0.5)) == 25.0
    clock[0] = 130.0
    assert ledger.left() == 20.0 and ledger.left(ledger.until(0.5)) == -5.0


# The whole command


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(build, "build", lambda log, seconds: {"seconds": 1.0, "nvcc": "release 13.0"})
    monkeypatch.setattr(device, "compile_kernels", lambda log, seconds: "")
    monkeypatch.setattr(device, "ROOT", tmp_path)
    monkeypatch.delenv("OUT", raising=False)
    return tmp_path


def test_without_a_gpu_nothing_is_measured(
    no_work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device, "gpu_name", lambda: "")
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
    process = subprocess.CompletedProcess([], 1, "", "Traceback\nImportError: libcudart is missing\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: process)
    assert device.main([]) == 1
    assert "BROKEN PyTorch: ImportError: libcudart is missing" in capsys.readouterr().out


EMPTY: dict[str, Any] = {"rows": [], "left_out": {}, "failed": {}}


class FakeWorker:
    """Answers like a GPU whose second contest breaks."""

    def __init__(self, module: str, log: Path) -> None:
        assert module == "bench.gpu.work"

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def run(self, job: Job) -> Outcome:
        names = ["rssm_observe a", "rssm_observe b", "knn_bonus c"]
        results: dict[str, Any] = {
            "device": {"GPU": "NVIDIA H100 80GB HBM3", "sms": 132, "l2_bytes": 50 * 2**20},
            "list": [{"name": name, "seconds": 9.0} for name in names],
            "ceiling": {f"{job.arguments.get('name')}_x": 1.0},
            "barrier": {f"barrier_{job.arguments.get('name')}_us": 1.5 if job.arguments.get("name") == "cuda" else 1.2},
        }
        if job.kind != "contest":
            return Outcome(job.name, results[job.kind])
        if job.name.endswith("b"):
            return Outcome(job.name, error="took more than 9 s")
        if job.name.endswith("c"):
            return Outcome(job.name, {"rows": [], "left_out": {}, "failed": {"triton": "ValueError: wrong"}})
        made = [row("rssm_observe", "triton", 0.5, "forward"), row("rssm_observe", "reference", 5.0, "forward")]
        return Outcome(job.name, {"rows": made, "left_out": {"cuda": "not built"}, "failed": {}})


def passing(report: Path, log: Path, seconds: float) -> dict[str, Any]:
    lines: list[dict[str, Any]] = [{"test": "f::a", "outcome": "passed", "seconds": 1.0, "why": ""}, {"collected": 2}]
    return suite.summary(lines) | {"stopped": True, "status": -1, "seconds": 2.0}


def test_whole_run(no_work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(device, "gpu_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(device, "Worker", FakeWorker)
    monkeypatch.setattr(suite, "run", passing)
    assert device.main(["--only", "rssm"]) == 1  # a contest broke
    (path,) = (no_work / "bench" / "results").glob("*-nvidia-h100-80gb-hbm3.json")
    content = json.loads(path.read_text())
    assert [row["backend"] for row in content["rows"]] == ["triton", "reference"]
    assert content["ceilings"]["barrier_us"] == 1.2 and content["ceilings"]["sms"] == 132
    assert content["machine"]["GPU"] == "NVIDIA H100 80GB HBM3"
    assert content["problems"] == {"rssm_observe b": "took more than 9 s"}
    assert content["not_run"] == {"1 of 2 tests": "their time was up"}
    assert content["left_out"] == {"rssm_observe a: cuda": "not built"}
    out = capsys.readouterr().out
    assert "BROKEN rssm_observe b: took more than 9 s" in out and "10.0x" in out
    assert f"wrote {path}" in out
    from bench import roofline

    assert roofline.main(["--measured", str(path)]) == 0  # reads what this wrote


def test_a_backend_that_should_have_run_is_a_problem(no_work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "gpu_name", lambda: "GPU")
    monkeypatch.setattr(device, "Worker", FakeWorker)
    path = no_work / "found.json"
    assert device.main(["--sections", "contests", "--only", "knn", "--json", str(path)]) == 1
    assert json.loads(path.read_text())["problems"] == {"knn_bonus c: triton": "ValueError: wrong"}
    lost = {"triton": "hung", "reference in a graph": "CaptureError: a host sync"}
    monkeypatch.setattr(device, "run_to_the_end", lambda worker, job, until: (Outcome("a", EMPTY), lost))
    assert device.main(["--sections", "contests", "--only", "knn", "--json", str(path)]) == 1
    content = json.loads(path.read_text())
    assert content["problems"] == {"knn_bonus c: triton": "hung"}  # a rival's is none
    assert content["left_out"] == {"knn_bonus c: reference in a graph": "CaptureError: a host sync"}
    monkeypatch.setattr(device, "run_to_the_end", run_to_the_end)
    # A contest that the end of the time cut off has not failed.
    monkeypatch.setattr(device, "MINIMUM", -1.0)
    arguments = ["--sections", "contests", "--only", "observe b", "--seconds", "0", "--json", str(path)]
    assert device.main(arguments) == 0
    assert json.loads(path.read_text())["not_run"]["rssm_observe b"] == "the time was up while it ran"


def test_sections_and_time(
    no_work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(device, "gpu_name", lambda: "GPU")
    monkeypatch.setattr(device, "Worker", FakeWorker)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert device.main(["--sections", "ceilings"]) == 0
    content = json.loads((tmp_path / "out" / "device.json").read_text())
    assert content["rows"] == [] and content["not_run"] == dict.fromkeys(
        ("build", "tests", "contests"), "not asked for"
    )
    assert device.main(["--sections", "ceilings,contests", "--seconds", "0"]) == 0
    content = json.loads((tmp_path / "out" / "device.json").read_text())
    assert content["not_run"]["contests"] == "no time left" and content["rows"] == []
    with pytest.raises(SystemExit):
        device.main(["--sections", "nonsense"])
    assert "must be some of" in capsys.readouterr().err


def test_a_failed_test_is_an_exit_status(no_work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "gpu_name", lambda: "GPU")
    monkeypatch.setattr(device, "Worker", FakeWorker)
    lines: list[dict[str, Any]] = [
        {"test": "f::a", "outcome": "failed", "seconds": 1.0, "why": "wrong"},
        {"collected": 1},
    ]
    failing = suite.summary(lines) | {"stopped": False, "status": 1, "seconds": 2.0}
    monkeypatch.setattr(suite, "run", lambda report, log, seconds: failing)
    assert device.main(["--sections", "tests"]) == 1


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

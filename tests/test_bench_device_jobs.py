"""What ``python -m bench.device`` runs in other processes: a bare checkout, jobs, the build, the tests."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bench", reason="bench/ is not installed; it runs from a checkout")
from bench.gpu import build, plugin, suite
from bench.gpu.checkout import ROOT, environment
from bench.gpu.jobs import Job, Worker, run_to_the_end

# A checkout that is not installed

NOT_INSTALLED = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in f"{f.__module__} {f}".lower()]
sys.path[:] = [p for p in sys.path if "editable" not in p]
"""


def run_python(code: str, **env: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(**env), capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_kernels_are_found_without_an_installation() -> None:
    find = "\nimport importlib.util as u; print(u.find_spec('apv_fast.kernels'))"
    assert run_python(NOT_INSTALLED + find).strip() == "None"
    use = "\nimport bench.gpu.checkout; from apv_fast.kernels import aot; print(aot.__file__)"
    assert run_python(NOT_INSTALLED + use).strip() == str(ROOT / "kernels" / "aot.py")


def test_the_interpreter_is_off_in_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" not in environment()
    assert environment(A="b")["A"] == "b"


@pytest.mark.parametrize("absent", [["pydantic", "tyro", "gymnasium", "dm_control", "mujoco", "nvtx", "tensorboard"]])
def test_a_bare_machine_can_run_updates(absent: list[str]) -> None:
    """The packages that a machine for computing does not have are not needed to import what is timed."""
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r}))\n"
    assert run_python(code + "import bench.gpu.updates, bench.gpu.work; print('fine')").strip() == "fine"


# Jobs in another process

FAKE = """
import os, sys, time
def run(kind, arguments, stage):
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
            if name == "hangs":
                time.sleep(60)
            if name == "dies":
                print("last words", file=sys.stderr)
                os._exit(7)
        return [name for name in arguments["names"] if name not in arguments["without"]]
"""


@pytest.fixture
def worker(tmp_path: Path) -> Any:
    (tmp_path / "fake_jobs.py").write_text(FAKE)
    with Worker("fake_jobs", tmp_path / "log", environment(PYTHONPATH=str(tmp_path))) as made:
        yield made


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


def test_nothing_is_begun_again_when_the_time_is_up(worker: Worker) -> None:
    job = Job("a", "contest", {"names": ["hangs"]}, seconds=60.0)
    outcome, broken = run_to_the_end(worker, job, until=time.monotonic() + 2)
    assert outcome.error and broken == {}


def test_a_module_that_cannot_be_imported_is_an_outcome(tmp_path: Path) -> None:
    with Worker("no_such_module", tmp_path / "log") as broken:
        outcome = broken.run(Job("a", "echo"))
    assert "did not start" in outcome.error and "No module named 'no_such_module'" in outcome.error


# The build


def test_build_says_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "commands", lambda folder: [["sh", "-c", "echo fatal error: here; exit 3"]])
    found = build.build(tmp_path / "log", 60)
    assert "status 3" in found["error"] and "fatal error: here" in found["error"]
    monkeypatch.setattr(build, "commands", lambda folder: [["sleep", "60"]])
    assert build.build(tmp_path / "log", 0.2)["error"] == "took more than 0 s"
    monkeypatch.setattr(build, "TOOLS", ("no-such-tool",))
    assert build.build(tmp_path / "log", 60)["error"] == "not found: no-such-tool"


def test_build_in_place() -> None:
    configure, compile_, install = build.commands(Path("folder"))
    assert f"-DCMAKE_INSTALL_PREFIX={ROOT / 'apv_fast'}" in configure
    assert compile_[:2] == ["cmake", "--build"] and install[:2] == ["cmake", "--install"]


# The tests

SUITE = """
import pytest
def test_passes(): pass
def test_fails(): assert 1 == 2, "because"
@pytest.mark.skip(reason="no reason")
def test_skipped(): pass
@pytest.fixture
def broken(): raise ValueError("in a fixture")
def test_broken(broken): pass
"""


def test_results_of_the_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_small.py").write_text(SUITE)
    (tmp_path / "test_absent.py").write_text("import gymnasium_is_not_here\ndef test_it(): pass\n")
    (tmp_path / "test_wrong.py").write_text("import bench.no_such_module\ndef test_it(): pass\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.setattr(suite, "TESTS", (str(tmp_path), "-c", str(tmp_path / "pytest.ini")))
    found = suite.run(tmp_path / "report", tmp_path / "log", 120, expression="not gpu")
    counts = {name: found[name] for name in ("collected", "passed", "failed", "skipped", "not_run", "stopped")}
    # Skipped: the marked one, and the module that needs a package; failed: two tests and the module that is wrong.
    assert counts == {"collected": 4, "passed": 1, "failed": 3, "skipped": 2, "not_run": 0, "stopped": False}
    whys = {Path(one["test"]).name: one["why"] for one in found["failures"]}
    assert "because" in whys["test_small.py::test_fails"]
    assert "in a fixture" in whys["test_small.py::test_broken"]
    assert "no_such_module" in whys["test_wrong.py"]
    assert found["unfinished"] == []
    assert found["skips"] == {"no reason": 1, "gymnasium_is_not_here is not installed": 1}


def test_what_matters_most_comes_first() -> None:
    class Item:
        def __init__(self, path: str, name: str) -> None:
            self.path, self.name = Path(path), name

    names = ["test_opcheck[observe-triton]", "test_values[ones-triton]", "test_values[odd-triton]"]
    items: list[Any] = [Item("tests/test_rssm.py", name) for name in names]
    items += [Item("tests/test_kl_balance.py", "test_values[triton]"), Item("tests/test_gpu.py", "test_full_size[x]")]
    items += [Item("tests/test_gpu.py", "test_barrier_orders[x]")]
    plugin.pytest_collection_modifyitems(items)
    found = [f"{item.path.name} {item.name}" for item in items]
    assert found[:2] == ["test_gpu.py test_barrier_orders[x]", "test_gpu.py test_full_size[x]"]
    assert found[2:] == [
        "test_rssm.py test_values[odd-triton]",
        "test_kl_balance.py test_values[triton]",
        "test_rssm.py test_values[ones-triton]",
        "test_rssm.py test_opcheck[observe-triton]",
    ]


def test_results_until_the_time_was_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that was skipped is not one of the tests that were collected."""
    lines: list[dict[str, Any]] = [{"collected": 4}, {"started": "g.py::a"}, {"started": "g.py::hangs"}]
    lines += [{"test": "f.py", "outcome": "skipped", "seconds": 0.0, "why": "x is not installed"}]
    lines += [{"test": "g.py::a", "outcome": "passed", "seconds": 1.0, "why": ""}]
    written = tmp_path / "written"
    written.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"test": "cut o')
    report = tmp_path / "report"
    monkeypatch.setattr(
        suite, "command", lambda expression, processes: ["sh", "-c", f"cp {written} {report}; sleep 60"]
    )
    start = time.monotonic()
    found = suite.run(report, tmp_path / "log", 1.0)
    assert time.monotonic() - start < 30
    assert found["stopped"] and (found["passed"], found["skipped"], found["not_run"]) == (1, 1, 3)
    assert found["unfinished"] == ["g.py::hangs"]


def test_tests_that_could_not_run_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "command", lambda expression, processes: ["sh", "-c", "echo no pytest; exit 4"])
    assert suite.run(tmp_path / "report", tmp_path / "log", 60)["error"] == "pytest's exit status is 4: no pytest"
    monkeypatch.setattr(suite, "command", lambda expression, processes: [str(tmp_path / "missing")])
    assert "missing" in suite.run(tmp_path / "report", tmp_path / "log", 60)["error"]


def test_every_backend_for_gpus_is_selected() -> None:
    """``-m gpu`` finds the tests of the table's GPU backends by themselves."""
    command = suite.command("gpu", processes=1)
    assert command[command.index("gpu") - 1 : command.index("gpu") + 1] == ["-m", "gpu"]
    process = subprocess.run(
        [*command, "--collect-only"], cwd=ROOT, env=environment(TRITON_INTERPRET="1"), capture_output=True, text=True
    )
    for name in ("test_gpu.py", "test_lambda_return.py", "test_kl_balance.py", "test_knn_bonus.py"):
        assert f"tests/{name}::" in process.stdout, process.stdout[-2000:]
    assert "tests/test_config.py::" not in process.stdout

"""What ``python -m bench.device`` runs in other processes: a bare checkout, jobs, the build, the tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bench", reason="bench/ is not installed; it runs from a checkout")
from apv_fast import cuda
from bench.gpu import build, cache, plugin, suite
from bench.gpu.checkout import CACHE, ROOT, environment
from bench.gpu.jobs import Job, Outcome, Worker, run_to_the_end, run_together

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


# What bench.device's docstring and the README name. A test blocks all other packages that are installed here.
NEEDED = ("torch", "triton", "numpy", "rich", "pillow")
FOR_TESTS = ("pytest", "hypothesis")
TRACE = """
import sys
from importlib import metadata
import re
closure, waiting = set(), list(ALLOWED)
while waiting:
    name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
    if name in closure:
        continue
    closure.add(name)
    try:
        needs = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        continue
    waiting += [re.match(r"[\\w.-]+", need)[0] for need in needs if "extra" not in need]
known = metadata.packages_distributions()
blocked = {top for top, owners in known.items() if not {re.sub(r"[-_.]+", "-", o).lower() for o in owners} & closure}
blocked -= {"apv_fast", "bench", "tests"}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""


@pytest.mark.parametrize(
    ("allowed", "code"),
    [
        ((), "import bench.device"),  # the parent, which never holds the device
        (NEEDED, "from bench.gpu import work; work.load()"),
        ((*NEEDED, *FOR_TESTS), "import bench.gpu.smoke, tests.test_gpu, bench.gpu.plugin"),
    ],
    ids=["parent", "child", "smoke and tests"],
)
def test_a_bare_machine_can_run_it(allowed: tuple[str, ...], code: str) -> None:
    """No package but those that we say is needed."""
    trace = NOT_INSTALLED + TRACE.replace("ALLOWED", repr(allowed)) + "import bench.gpu.checkout\n"
    assert run_python(trace + code + "\nprint('fine')").strip() == "fine"


def test_what_is_needed_is_what_we_say() -> None:
    from bench import device

    said = str(device.__doc__).lower() + (ROOT / "README.md").read_text().lower()
    assert all(said.count(name) >= 2 for name in (*NEEDED, *FOR_TESTS))
    for name in ("torch", "numpy", "rich", "PIL"):  # Triton is imported when a kernel first runs
        with pytest.raises(AssertionError, match=f"No module named '{name}"):
            trace = NOT_INSTALLED + TRACE.replace("ALLOWED", "()").replace(
                "blocked -=", f"blocked = {{{name!r}}}; blocked -="
            )
            run_python(trace + "import bench.gpu.checkout\nfrom bench.gpu import work; work.load()")


# Jobs in another process

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
            tell.found({"at": name})
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


def test_what_was_told_is_kept_and_not_done_again(worker: Worker) -> None:
    job = Job("a", "contest", {"names": ["one", "dies", "two", "hangs", "three"], "one by one": True}, 60.0, 1.0)
    told: list[str] = []
    outcome, broken = run_to_the_end(
        worker, job, until=time.monotonic() + 60, found=lambda item: told.append(item["at"])
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


# The library and the cache of kernels


def nvcc(folder: Path, script: str) -> Path:
    path = folder / "bin" / "nvcc"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo release 13.0 && exit\n{script}\n')
    path.chmod(0o755)
    return path.parent


def test_a_library_that_loads_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it came here; no compiler is needed."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "_cuda.so")
    (tmp_path / "_cuda.so").write_text("carried")
    found = build.build(build.Found("GPU", library=True), tmp_path / "log", 60)
    assert found["library"].startswith("found, sha256 ") and "error" not in found
    found = build.build(build.Found("GPU", why="cannot be loaded"), tmp_path / "log", 60)
    assert found["error"] == "the CUDA C++ library: nvcc is not on the path" and "library" not in found


def test_a_library_that_does_not_load_is_built_for_this_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, library = tmp_path / "calls", tmp_path / "apv" / "_cuda.so"
    script = f'echo "$@" >> {calls}\nwhile [ "$1" != -o ]; do shift; done\necho new > "$2"'
    monkeypatch.setenv("PATH", f"{nvcc(tmp_path, script)}:/usr/bin:/bin")
    monkeypatch.setattr(build, "LIBRARY", library)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    library.parent.mkdir()
    library.write_text("of another machine")
    found = build.build(build.Found("GPU", (9, 0), why="it is cut off"), tmp_path / "log", 60)
    assert "error" not in found and "built for sm_90a (it is cut off)" in found["library"]
    assert library.read_text() == "new\n" and [path.name for path in library.parent.iterdir()] == ["_cuda.so"]
    lines = calls.read_text().splitlines()
    assert len(lines) == 4 and all("arch=compute_90a,code=sm_90a" in line and "sm_80" not in line for line in lines)


def test_a_gpu_has_the_name_that_its_generation_is_shipped_under() -> None:
    for major, shipped in cuda.ARCHITECTURES.items():
        assert f"sm_{build.architecture((major, 0))}" == shipped
    later = [(8, 6), (8, 9), (10, 3), (12, 1)]
    assert [build.architecture(capability) for capability in later] == ["86", "89", "103", "121"]


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")
@pytest.mark.parametrize("number", [90, 100, 120])
@pytest.mark.parametrize(
    "source",
    [
        "bench/gpu/barrier.cu",
        pytest.param("csrc/cuda/scan_forward.cu", marks=pytest.mark.slow),
        pytest.param("csrc/cuda/scan_backward.cu", marks=pytest.mark.slow),
    ],
)
def test_no_kernel_needs_what_one_gpu_alone_has(source: str, number: int, tmp_path: Path) -> None:
    """nvcc makes the same of a source for the plain name and the one with an "a".

    That the plain names' assembler takes it: tests/test_cuda_compile.py.
    """

    def ptx(arch: str) -> list[str]:
        made = tmp_path / f"{arch}.ptx"
        command = ["nvcc", "-O3", "-std=c++17", f"-arch=compute_{arch}", f"-I{ROOT / 'csrc' / 'cuda'}", "-ptx"]
        subprocess.run([*command, str(ROOT / source), "-o", str(made)], check=True)
        lines = made.read_text().splitlines()
        assert f".target sm_{arch}" in lines
        return [line for line in lines if not line.startswith(".target")]

    assert ptx(str(number)) == ptx(f"{number}a")


def test_a_build_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "_cuda.so"
    library.write_text("old")
    monkeypatch.setattr(build, "LIBRARY", library)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", f"{nvcc(tmp_path, 'echo fatal error: here; exit 3')}:/usr/bin:/bin")
    found = build.build(build.Found("GPU", why="old"), tmp_path / "log", 60)
    assert "fatal error: here" in found["error"] and library.read_text() == "old"
    (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(RuntimeError, match="was not done when the time was up"):
        build.compile_library("90a", tmp_path / "out", tmp_path / "log", 0.3)


def test_what_is_here() -> None:
    found = build.look(300.0)
    assert found.library == build.LIBRARY.exists() and bool(found.why) != found.library


def test_the_cache_of_kernels_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed in one checkout, found in another: Triton's lists then name the files there."""
    here, there = tmp_path / "here", tmp_path / "there"
    kernel = here / "triton" / "KEY"
    kernel.mkdir(parents=True)
    (kernel / "k.cubin").write_bytes(b"code")
    (kernel / "__grp__k.json").write_text(json.dumps({"child_paths": {"k.cubin": str(kernel / "k.cubin")}}))
    (kernel / "lock").write_text("")
    (kernel / "tmp.pid_7").mkdir()
    (kernel / "tmp.pid_7" / "half").write_text("half")
    (here / "inductor" / "fx").mkdir(parents=True)
    (here / "inductor" / "fx" / "graph").write_bytes(os.urandom(300_000))
    monkeypatch.setattr(cache, "CACHE", here)
    tar = tmp_path / cache.NAME
    assert cache.pack(tar).startswith("3 files of triton and inductor")
    monkeypatch.setattr(cache, "CACHE", there)
    assert cache.unpack(tmp_path / "none") == ""
    assert cache.unpack(tar) == f"3 files of {cache.NAME}"
    group = json.loads((there / "triton" / "KEY" / "__grp__k.json").read_text())
    assert Path(group["child_paths"]["k.cubin"]).read_bytes() == b"code"
    assert group["child_paths"]["k.cubin"].startswith(str(there))
    assert not list(there.rglob("half")) and not list(there.rglob("lock"))
    monkeypatch.setattr(cache, "CACHE", here)
    monkeypatch.setattr(cache, "LIMIT", 100_000)
    assert cache.pack(tar).startswith("2 files of triton,")
    tar.write_bytes(tar.read_bytes()[:50])
    monkeypatch.setattr(cache, "CACHE", there)
    assert "cannot be read" in cache.unpack(tar) and not there.exists()


def test_children_compile_into_the_cache() -> None:
    env = environment()
    assert env["TRITON_CACHE_DIR"] == str(CACHE / "triton") or "TRITON_CACHE_DIR" in os.environ
    assert str(cache.CARRIED.parent) == str(ROOT / "build")


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
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # of these tests, not of those
    (tmp_path / "test_small.py").write_text(SUITE)
    (tmp_path / "test_absent.py").write_text("import gymnasium_is_not_here\ndef test_it(): pass\n")
    (tmp_path / "test_wrong.py").write_text("import bench.no_such_module\ndef test_it(): pass\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    ini = ("-c", str(tmp_path / "pytest.ini"))
    parts = ((str(tmp_path / "test_small.py"), *ini), (str(tmp_path), f"--ignore={tmp_path / 'test_small.py'}", *ini))
    monkeypatch.setattr(suite, "PARTS", parts)
    monkeypatch.setattr(suite, "WAIT", 0.2)
    seen: list[dict[str, Any]] = []
    found = suite.run(tmp_path / "report", tmp_path / "log", 240, expression="not gpu", progress=seen.append)
    assert [one["passed"] for one in seen] == sorted(one["passed"] for one in seen) and found["parts"] == 2
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
    lines: list[dict[str, Any]] = [{"part": []}, {"collected": 4}, {"started": "g.py::a"}, {"started": "g.py::hangs"}]
    lines += [{"test": "f.py", "outcome": "skipped", "seconds": 0.0, "why": "x is not installed"}]
    lines += [{"test": "g.py::a", "outcome": "passed", "seconds": 1.0, "why": ""}]
    written = tmp_path / "written"
    written.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"test": "cut o')
    report = tmp_path / "report"
    monkeypatch.setattr(
        suite, "command", lambda expression, part, processes: ["sh", "-c", f"cp {written} {report}; sleep 60"]
    )
    start = time.monotonic()
    found = suite.run(report, tmp_path / "log", 1.0)
    assert time.monotonic() - start < 30
    assert found["parts"] == 1  # the other has not begun
    assert found["stopped"] and (found["passed"], found["skipped"], found["not_run"]) == (1, 1, 3)
    assert found["unfinished"] == ["g.py::hangs"]


def test_tests_that_could_not_run_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "command", lambda expression, part, processes: ["sh", "-c", "echo no pytest; exit 4"])
    assert suite.run(tmp_path / "report", tmp_path / "log", 60)["error"].startswith(
        "pytest's exit status is 4: no pytest"
    )
    monkeypatch.setattr(suite, "command", lambda expression, part, processes: [str(tmp_path / "missing")])
    assert "missing" in suite.run(tmp_path / "report", tmp_path / "log", 60)["error"]


@pytest.mark.thorough
def test_every_backend_for_gpus_is_selected() -> None:
    """``-m gpu`` finds the tests of the table's GPU backends by themselves."""
    assert suite.PARTS[0] == ("tests/test_gpu.py",) and "--ignore=tests/test_gpu.py" in suite.PARTS[1]
    command = suite.command("gpu", ("tests",), processes=1)
    assert command[command.index("gpu") - 1 : command.index("gpu") + 1] == ["-m", "gpu"]
    process = subprocess.run(
        [*command, "--collect-only"], cwd=ROOT, env=environment(TRITON_INTERPRET="1"), capture_output=True, text=True
    )
    for name in ("test_gpu.py", "test_lambda_return.py", "test_kl_balance.py", "test_knn_bonus.py"):
        assert f"tests/{name}::" in process.stdout, process.stdout[-2000:]
    assert "tests/test_config.py::" not in process.stdout

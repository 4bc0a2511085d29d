"""``python -m bench.device``, as far as it can be tested without a GPU: everything but the figures."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("bench", reason="bench/ is not installed; it runs from a checkout")
from apv_fast import ops
from apv_fast.backend import IMPLEMENTATIONS, BackendError, probe
from apv_fast.ops import Latent
from bench import device, timing
from bench.cost.machine import MACHINES
from bench.gpu import barrier, build, contests, hoisted, plugin, pointwise, scans, suite, table, targets, updates, work
from bench.gpu.checkout import ROOT, environment
from bench.gpu.contests import Contest, Passes
from bench.gpu.graphs import CaptureError
from bench.gpu.jobs import Job, Outcome, Worker, run_to_the_end
from bench.gpu.ledger import Ledger
from bench.registry import COMPILED
from tests import cooperative
from tests.rssm_cases import Sizes, make_problem, params_of

CPU = torch.device("cpu")
TINY = {"B": 2, "T": 3, "E": 5, "A": 4, "deter": 6, "hidden": 7, "stoch": 2, "discrete": 3}

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


# The barrier's tests and the kernels that measure

KERNELS = """
from apv_fast.kernels.aot import Kernel, compile_kernel
where = "bench.gpu.barrier_kernels"
one = {"counter": "*i32", "rounds": "i32"}
stress = {"counter": "*i32", "rows": "*i32", "wrong": "*i32", "rounds": "i32"}
read = {"source": "*i32", "sums": "*i32", "size": "i32"}
kernels = [Kernel("latency", f"{where}:latency_kernel", one, {}, options={"num_warps": 8})]
for fault in range(4):
    constants = {"FAULT": fault, "BLOCK": 256, "LATE": 8}
    kernels.append(Kernel(f"stress{fault}", f"{where}:stress_kernel", stress, constants, options={"num_warps": 8}))
constants, aligned = {"ROUNDS": 9, "BLOCK": 16384}, frozenset(read)
kernels.append(Kernel("read", "bench.gpu.gather:read_kernel", read, constants, aligned, {"num_warps": 8}))
for arch in (80, 90):
    for kernel in kernels:
        found = compile_kernel(kernel, arch)
        print(kernel.name, found.spill_stores + found.spill_loads, found.ptx.count("ld.global.cg.v4"))
"""

LAUNCHES = """
import sys
from pathlib import Path
from tests import fake_gpu
library = fake_gpu.install(Path(sys.argv[1]))
from bench.gpu import barrier
from bench.gpu.gather import BLOCK, read_kernel
barrier.DEVICE = "cpu"
barrier._triton_rounds(3)
for fault in ("", *barrier.FAULTS):
    assert barrier.stress("triton", 5, fault) == 0  # nothing runs
source, sums = barrier._zero(4 * BLOCK), barrier._zero(132 * BLOCK)
read_kernel[(132,)](source, sums, source.numel(), ROUNDS=4, BLOCK=BLOCK, num_warps=8)
print(library.fake_launches(), library.fake_cooperative())
"""


def test_kernels_that_measure_compile_without_spills() -> None:
    pytest.importorskip("triton")
    lines = [line.split() for line in run_python(KERNELS).splitlines()]
    assert [line[0] for line in lines] == ["latency", "stress0", "stress1", "stress2", "stress3", "read"] * 2
    assert all(spills == "0" for _, spills, _ in lines)
    assert [loads for name, _, loads in lines if name == "read"] == ["16", "16"]  # all on their way at once


@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="the fake driver needs a C compiler")
def test_kernels_that_measure_are_launched(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    process = subprocess.run(
        [sys.executable, "-c", LAUNCHES, str(tmp_path)], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ["6", "5"]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_barrier_of_the_cuda_kernels_compiles(capability: tuple[int, int], tmp_path: Path) -> None:
    library = ctypes.CDLL(str(barrier.compile_cuda(tmp_path, capability)))
    assert library.barrier_latency and library.barrier_stress


def stress(fault: int, seed: int) -> int:
    """Reads of a wrong round in 24 rounds of three programs, in Triton's interpreter."""
    from bench.gpu.barrier_kernels import stress_kernel

    block, programs = 4, 3
    rows, wrong = torch.zeros(2 * programs * block, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    counter = torch.zeros(1, dtype=torch.int32)
    late = 2  # more turns in a row, and the interpreter would take it for a deadlock
    cooperative.launch(
        stress_kernel, programs, counter, rows, wrong, 24, FAULT=fault, BLOCK=block, LATE=late, seed=seed
    )
    return int(wrong)


@pytest.mark.skipif(probe("triton").isa != "interpreter", reason="for Triton's interpreter")
def test_stress_test_notices_wrong_orders_only() -> None:
    assert stress(0, seed=0) == 0
    for fault in barrier.FAULTS.values():
        assert any(stress(fault, seed) for seed in range(3)), fault


# Contests, on the CPU with tiny sizes


class Uncaptured:
    def __init__(self, work: Callable[[], object]) -> None:
        self.replay = work


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contests on the CPU: no graph, no memory statistics, few rounds."""
    for module in (contests, scans, pointwise, updates, work):
        if hasattr(module, "DEVICE"):
            monkeypatch.setattr(module, "DEVICE", CPU)
        if hasattr(module, "capture"):
            monkeypatch.setattr(module, "capture", Uncaptured)
    monkeypatch.setattr(contests, "OURS", ("reference",))
    monkeypatch.setattr(work, "_prepared", lambda prepare: (prepare(), 1.0))
    monkeypatch.setattr(timing, "WARM_UP_SECONDS", 0.0)
    monkeypatch.setattr(timing, "MIN_ROUNDS", 2)


def compete(op: str, players: Callable[[Contest], Any], shape: Mapping[str, int], without: Sequence[str] = ()) -> Any:
    found = Contest(op, shape, "float32", players)
    arguments = {"without": list(without), "pass_seconds": 0.0}
    return work.compete(found, arguments, lambda name: None)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("op", "players"),
    [
        ("rssm_observe", scans.rssm_observe),
        ("stacked_observe", scans.stacked_observe),
        ("rssm_imagine", scans.rssm_imagine),
    ],
)
def test_contests_of_scans(op: str, players: Callable[[Contest], Any]) -> None:
    found = compete(op, players, TINY)
    assert found["left_out"] == {}
    assert {row["pass"] for row in found["rows"]} == {"forward", "forward_backward"}
    names = {row["backend"] for row in found["rows"]}
    assert {"reference", "reference in a graph"} <= names
    assert ("two scans, reference" in names) == (op == "stacked_observe")
    for row in found["rows"]:
        assert row["shape"] == TINY and row["cache"] == "cold" and row["median_ms"] > 0


@pytest.mark.usefixtures("on_cpu")
def test_a_contestant_that_fails_is_left_out() -> None:
    def players(contest: Contest) -> dict[str, Callable[[], Passes]]:
        def fails() -> Passes:
            raise ValueError("not here")

        def refuses() -> Passes:
            raise BackendError("not this dtype")

        ours = {"triton, a launch a phase": fails, "cuda": refuses, "two scans, triton": fails, "auto": fails}
        return {"fine": lambda: {"forward": lambda: None}, "fails": fails, "hung before": fails} | ours

    found = compete("rssm_observe", players, TINY, without=["hung before"])
    assert found["left_out"] == {"fails": "ValueError: not here", "cuda": "BackendError: not this dtype"}
    failed = ("triton, a launch a phase", "two scans, triton", "auto")
    assert found["failed"] == dict.fromkeys(failed, "ValueError: not here")
    assert [row["backend"] for row in found["rows"]] == ["fine"]
    assert found["rows"][0]["baseline_ratio"] is None


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error: unspecified launch failure"), CaptureError("a host sync")],
    ids=["CUDA", "graph"],
)
def test_an_error_that_ends_the_process(error: Exception) -> None:
    """And not only the contestant."""

    def broken() -> Passes:
        raise error

    with pytest.raises(type(error), match=str(error)):
        compete("rssm_observe", lambda contest: {"broken": broken}, TINY)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("op", "players", "more"),
    [("pretrain_update", updates.pretrain_update, {}), ("finetune_update", updates.finetune_update, {"horizon": 2})],
)
def test_contests_of_updates(
    op: str, players: Callable[[Contest], Any], more: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(updates.WAYS, "auto", ("auto", "auto"))
    monkeypatch.delitem(updates.WAYS, "reference in a graph")  # an error without a GPU
    shape = {"B": 1, "T": 6, "deter": 8, "hidden": 8, "cnn_depth": 2, **more}
    found = compete(op, players, shape)
    assert found["left_out"] == {}
    assert {row["backend"] for row in found["rows"]} == {"auto", "auto, without a graph", "reference"}
    assert {row["pass"] for row in found["rows"]} == {"forward_backward"}
    assert all(row["peak_mb"] == 1.0 for row in found["rows"])


@pytest.mark.usefixtures("on_cpu")
def test_contests_of_other_ops() -> None:
    """The largest case of every op that a backend for GPUs has."""
    cases = {case.op: case for case in pointwise.largest()}
    assert cases["lambda_return"].shape == {"H": 15, "N": 2500}
    assert not {"rssm_observe", "pretrain_update"} & cases.keys()
    case = cases["lambda_return"]
    without = [COMPILED + contests.GRAPH]  # takes a while
    found = compete("lambda_return", functools.partial(pointwise._players, case), case.shape, without)
    assert {"reference", "reference in a graph"} <= {row["backend"] for row in found["rows"]}


def test_names_and_order_of_contests() -> None:
    found = work.load()
    names = [contest.name for contest in found]
    assert len(set(names)) == len(names)
    assert names[0].startswith("rssm_observe B=16 T=50") and names[0].endswith("bfloat16")
    gpu = {op for op, row in IMPLEMENTATIONS.items() if {"triton", "cuda"} & row.keys()}
    assert gpu - {"rssm_step"} <= {contest.op for contest in found}
    assert [contest.dtype for contest in found].index("tf32") > names.index(next(n for n in names if "finetune" in n))


def test_the_compiled_rival_is_the_reference() -> None:
    """Hoisting changes neither values nor gradients, and all steps are one compiled function."""
    sizes = Sizes(3, 4, 5, 2, 3, 7, 6, 2, 5)
    tensors = make_problem(sizes, torch.float64)
    params, latent = params_of(tensors), Latent(sizes.stoch, sizes.discrete)
    leaves = [x.requires_grad_() for x in (*params, tensors["embed"], tensors["action"])]
    noise = (tensors["post_noise"], tensors["prior_noise"])
    inputs = (tensors["embed"], tensors["is_first"], tensors["action"])
    graphs: list[object] = []

    def count(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    step = torch.compile(hoisted.step, backend=count, dynamic=False, fullgraph=True)
    got = hoisted.observe(step, params, *inputs, latent, *noise)
    assert len(graphs) == 1
    post, prior = ops.rssm_observe(params, *inputs, latent=latent, noise=noise, backend="reference")
    expected = [post["deter"], post["stoch"], post["logit"], prior["stoch"], prior["logit"]]
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in expected]
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y)
    gradients = [torch.autograd.grad(outputs, leaves, cotangents) for outputs in (got, expected)]
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y)
    torch.compiler.reset()


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
    assert line.split()[:9] == ["rssm_observe", "B=16", "T=50", "bfloat16", "f", "0.866", "0.866", "50%", "cuda"]
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

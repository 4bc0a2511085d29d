"""What ``python -m bench.device`` measures: its own kernels, and contests, on the CPU with tiny sizes."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("bench", reason="bench/ is not installed; it runs from a checkout")
from apv_fast import ops
from apv_fast.agent.agent import Agent, Pretrainer
from apv_fast.agent.behavior import ImaginationNoise
from apv_fast.agent.world_model import StackNoise
from apv_fast.backend import IMPLEMENTATIONS, BackendError, probe, use_backend
from apv_fast.nn import RSSM, Actor, StackedRSSM
from apv_fast.ops import Latent
from bench import timing
from bench.cases.updates import finetune_setup
from bench.gpu import (
    barrier,
    compiled,
    contests,
    forecast,
    hoisted,
    pointwise,
    scanned,
    scans,
    smoke,
    updates,
    work,
)  # fmt: skip
from bench.gpu.checkout import ROOT, environment
from bench.gpu.contests import Contest, Passes
from bench.gpu.graphs import CaptureError
from bench.peers import remote
from bench.registry import COMPILED
from tests import cooperative, peer_trees
from tests.rssm_cases import Sizes, make_problem, params_of
from tests.test_bench_device_jobs import run_python

CPU = torch.device("cpu")
TINY = {"B": 2, "T": 3, "E": 5, "A": 4, "deter": 6, "hidden": 7, "stoch": 2, "discrete": 3}

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


@pytest.mark.thorough
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
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_barrier_of_the_cuda_kernels_compiles(capability: tuple[int, int], tmp_path: Path) -> None:
    library = ctypes.CDLL(str(barrier.compile_cuda(tmp_path, capability)))
    assert library.barrier_latency and library.barrier_stress


def test_barrier_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes second waits for the first, and no half of a library is ever there."""
    calls = tmp_path / "calls"
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        f'#!/bin/sh\necho call >> {calls}\nwhile [ "$1" != -o ]; do shift; done\n'
        f'printf half > "$2"; sleep 0.5; ls {tmp_path}/made >> {calls}; printf whole > "$2"\n'
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}")
    code = f"""
from pathlib import Path
from bench.gpu import barrier
print(barrier.compile_cuda(Path({str(tmp_path / "made")!r}), (9, 0)).read_text())
"""
    running = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in "123"
    ]
    assert [process.communicate(timeout=120)[0].strip() for process in running] == ["whole"] * 3
    said = calls.read_text().split()
    assert said.count("call") == 1 and not any(name.endswith(".so") for name in said)


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


# Smoke: the checks, on the CPU


def test_orders_judges_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(barrier, "stress", lambda kind, rounds, fault="": 3 if fault else 0)
    assert smoke.orders("triton")["wrong reads"] == 0
    monkeypatch.setattr(barrier, "stress", lambda kind, rounds, fault="": 0)
    with pytest.raises(AssertionError, match="with a fault planted"):
        smoke.orders("cuda")
    monkeypatch.setattr(barrier, "stress", lambda kind, rounds, fault="": 1)
    with pytest.raises(AssertionError, match="1 reads of a wrong round"):
        smoke.orders("cuda")


class Learner:
    """A weight that random numbers move; ``wrong`` moves it otherwise in a graph from some update on."""

    def __init__(self, graph: str, wrong: int = 1000) -> None:
        self.weight, self.updates, self.wrong = torch.zeros(3), 0, wrong if graph == "on" else 1000

    def update(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.updates += 1
        self.weight += torch.randn(3) + (1e-6 if self.updates >= self.wrong else 0)
        return {"loss": self.weight.sum()}

    def tensors(self) -> list[torch.Tensor]:
        return [self.weight]


def test_replays_are_held_to_the_bit() -> None:
    found = smoke.replayed(Learner, {}, 20)
    assert found["updates"] == 20 and found["first loss"] != found["last loss"]
    with pytest.raises(AssertionError, match="first update with another loss: 7;"):
        smoke.replayed(lambda graph: Learner(graph, 7), {}, 20)


def test_checks_are_those_of_the_issue(monkeypatch: pytest.MonkeyPatch) -> None:
    scans_ = [f"observe {backend} B={batch}" for backend in ("cuda", "triton") for batch in (16, 50)]
    assert set(smoke.CHECKS) == {"barrier triton", "barrier cuda", "pre-training update, replayed", *scans_}
    with pytest.raises(RuntimeError, match="CUDA device"):
        smoke.CHECKS["observe cuda B=16"]()


@pytest.mark.skipif(probe("triton").isa != "interpreter", reason="for Triton's interpreter")
def test_the_check_of_the_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a small size in the interpreter; a wrong product is noticed."""
    from tests import test_gpu, test_rssm

    monkeypatch.setattr(test_gpu, "full", lambda batch, length: Sizes(2, 3, 5, 2, 3, 8, 7, 2, 3))
    assert smoke.observe("triton", 16)
    measure = test_rssm.measure
    monkeypatch.setattr(
        test_rssm, "measure", lambda *a: {k: (1e2 * ours, own) for k, (ours, own) in measure(*a).items()}
    )
    with pytest.raises(AssertionError, match="error"):
        smoke.observe("triton", 16)


def test_training_is_asked_for_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it reports goes on at once; it gets the seconds that the job has."""
    told, module = Told(), ModuleType("bench.gpu.train")

    def measure(seconds: float, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        report({"updates": 1})
        assert told.events == [("found", {"updates": 1})]
        return {"seconds": seconds}

    module.measure = measure  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bench.gpu.train", module)
    assert work.run("train", {"seconds": 7.0}, told) == {"seconds": 7.0}  # type: ignore[arg-type]


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


class Told:
    """In place of :class:`bench.gpu.worker.Tell`: keeps what a job says, as the parent would."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def stage(self, name: str) -> None:
        self.events.append(("stage", name))

    def found(self, item: Any) -> None:
        self.events.append(("found", item))

    def finished(self, name: str) -> None:
        self.events.append(("finished", name))

    def items(self, key: str) -> list[Any]:
        return [item for kind, item in self.events if kind == "found" and key in item]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The last row of each contestant, pass and cache."""
        last = {
            (item["row"]["backend"], item["row"]["pass"], item["row"]["cache"]): item["row"]
            for item in self.items("row")
        }
        return list(last.values())

    def lost(self, kind: str) -> dict[str, str]:
        return {item[kind]: item["why"] for item in self.items(kind)}


def compete(op: str, players: Callable[[Contest], Any], shape: Mapping[str, int], without: Sequence[str] = ()) -> Told:
    """Both kinds of contestants, one after the other."""
    told = Told()
    arguments = {"without": list(without), "pass_seconds": 0.0}
    for run in (work.core, work.rivals):
        run(Contest(op, shape, "float32", players), arguments, told)  # type: ignore[arg-type]
    return told


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
    assert found.lost("left_out") == {}
    assert {row["pass"] for row in found.rows} == {"forward", "forward_backward"}
    names = {row["backend"] for row in found.rows}
    assert {"reference", "reference in a graph"} <= names
    assert ("two scans, reference" in names) == (op == "stacked_observe")
    for row in found.rows:
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
    assert found.lost("left_out") == {"fails": "ValueError: not here", "cuda": "BackendError: not this dtype"}
    failed = ("triton, a launch a phase", "two scans, triton", "auto")
    assert found.lost("failed") == dict.fromkeys(failed, "ValueError: not here")
    assert [row["backend"] for row in found.rows] == ["fine"]
    assert found.rows[0]["baseline_ratio"] is None


def instant(contest: Contest) -> dict[str, Callable[[], Passes]]:
    """Contestants of both kinds that do nothing."""

    def ready() -> Passes:
        return {"forward": lambda: None, "forward_backward": lambda: None}

    return dict.fromkeys(("cuda", "triton", "reference", "triton, a launch a phase", "one rival", "another"), ready)


@pytest.mark.usefixtures("on_cpu")
def test_rows_are_told_as_they_are_made() -> None:
    """A contestant's own as soon as it is ready; those in turns with the others later, in place of them."""
    told, arguments = Told(), {"without": [], "pass_seconds": 0.0}
    work.core(Contest("rssm_observe", TINY, "float32", instant), arguments, told)  # type: ignore[arg-type]
    said = [item["row"]["backend"] if kind == "found" else f"at {item}" for kind, item in told.events]
    alone = [word for name in ("cuda", "triton", "reference") for word in (f"at {name}", name, name)]
    assert said == ["at the inputs", *alone, "at ", *["cuda", "triton", "reference"] * 2]
    rows = [item["row"] for item in told.items("row")]
    assert [bool(row.get("alone")) for row in rows] == [True] * 6 + [False] * 6
    assert all(row["baseline_ratio"] is None for row in rows if row.get("alone") and row["backend"] != "reference")
    assert all(row["baseline_ratio"] > 0 for row in rows[6:])


@pytest.mark.usefixtures("on_cpu")
def test_each_rival_takes_turns_with_ours() -> None:
    """And its row has their times in the same rounds; nobody else's row is made anew."""
    told, arguments = Told(), {"without": ["another"], "pass_seconds": 0.0}
    work.rivals(Contest("rssm_observe", TINY, "float32", instant), arguments, told)  # type: ignore[arg-type]
    rows = [item["row"] for item in told.items("row")]
    rivals = ["one rival"] * 2 + ["triton, a launch a phase"] * 2  # which no target is about
    assert [row["backend"] for row in rows] == rivals
    assert all(set(row["beside_ms"]) == {"cuda", "triton"} and min(row["beside_ms"].values()) > 0 for row in rows)
    assert [name for kind, name in told.events if kind == "finished"] == ["one rival", "triton, a launch a phase"]


@pytest.mark.usefixtures("on_cpu")
def test_a_warm_up_prepares_and_times_nothing() -> None:
    prepared: list[str] = []

    def players(contest: Contest) -> dict[str, Callable[[], Passes]]:
        def prepare(name: str) -> Passes:
            prepared.append(name)
            return {}

        return {name: functools.partial(prepare, name) for name in instant(contest)}

    jobs: list[tuple[str, dict[str, int], list[str]]] = [
        ("core", {"turn": 0, "of": 1}, ["cuda", "triton", "reference"]),
        ("rivals", {}, ["one rival", "another"]),
        ("rivals", {"turn": 1, "of": 2}, ["another"]),
        ("rivals", {"turn": 2, "of": 3}, []),
    ]
    for who, turn, expected in jobs:
        prepared.clear()
        told, arguments = Told(), {"without": ["triton, a launch a phase"], "who": who, **turn}
        work.warm_up(Contest("rssm_observe", TINY, "float32", players), arguments, told)  # type: ignore[arg-type]
        assert prepared == expected and told.items("row") == []


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
    op: str, players: Callable[[Contest], Any], more: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(updates.WAYS, "auto", ("auto", "auto"))
    monkeypatch.delitem(updates.WAYS, "reference in a graph")  # an error without a GPU
    monkeypatch.setattr(updates, "COMPILED_WAY", ("reference", "off"))
    learners: list[object] = []
    monkeypatch.setattr(updates, "compile_update", learners.append)  # compilation has a test of its own
    monkeypatch.setenv("APV_FAST_PEER_CONTEXTWM", str(tmp_path))
    shape = {"B": 1, "T": 6, "deter": 8, "hidden": 8, "cnn_depth": 2, **more}
    found = compete(op, players, shape)
    assert found.lost("left_out") == {"ContextWM": f"PeerError: path is {tmp_path}: there is no wmlib"}
    names = {"auto", "auto, without a graph", "reference", "torch.compile in a graph"}
    assert {row["backend"] for row in found.rows} == names
    assert [type(learner) for learner in learners] == [Pretrainer if op == "pretrain_update" else Agent]
    assert {row["pass"] for row in found.rows} == {"forward_backward"}
    assert all(row["peak_mb"] == 1.0 for row in found.rows)


@pytest.mark.usefixtures("on_cpu")
def test_a_peer_is_a_contestant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With what is to be said of it in its row."""
    pytest.importorskip("yaml", reason="the peers' configurations are YAML")
    monkeypatch.setenv("APV_FAST_PEER_CONTEXTWM", str(peer_trees.contextwm(tmp_path / "mini")))
    shape = {"B": 1, "T": 6, "deter": 8, "hidden": 8, "cnn_depth": 2}
    found = compete("pretrain_update", updates.pretrain_update, shape, [*updates.WAYS, COMPILED + contests.GRAPH])
    assert found.lost("left_out") == found.lost("failed") == {}
    (row,) = found.rows
    assert (row["backend"], row["shape"], row["cache"]) == ("ContextWM", shape, "cold")
    assert row["median_ms"] > 0 and row["version"] == "mini" and row["parameters"] == 8
    assert row["peak_mb"] is None  # of its own process, which has no GPU here
    assert any("carried over" in words for words in row["differs"])


@pytest.mark.usefixtures("on_cpu")
def test_contests_of_other_ops() -> None:
    """The largest case of every op that a backend for GPUs has."""
    cases = {case.op: case for case in pointwise.largest()}
    assert cases["lambda_return"].shape == {"H": 15, "N": 2500}
    assert not {"rssm_observe", "pretrain_update"} & cases.keys()
    case = cases["lambda_return"]
    without = [COMPILED + contests.GRAPH]  # takes a while
    found = compete("lambda_return", functools.partial(pointwise._players, case), case.shape, without)
    assert {"reference", "reference in a graph"} <= {row["backend"] for row in found.rows}


def test_names_and_order_of_contests() -> None:
    found = work.load()
    names = [contest.name for contest in found]
    assert len(set(names)) == len(names)
    assert names[0].startswith("rssm_observe B=16 T=50") and names[0].endswith("bfloat16")
    gpu = {op for op, row in IMPLEMENTATIONS.items() if {"triton", "cuda"} & row.keys()}
    assert gpu - {"rssm_step"} <= {contest.op for contest in found}
    assert [contest.dtype for contest in found].index("tf32") > names.index(next(n for n in names if "finetune" in n))
    wanted = {one["name"]: one["rivals"] for one in work.run("list", {}, Told()) if one["target"]}  # type: ignore[arg-type]
    for name, cost in forecast.CONTESTS.items():
        (found_name,) = (one for one in wanted if one.startswith(f"{name} "))
        assert wanted[found_name] == cost.needed
    assert len(wanted) == len(forecast.CONTESTS) == 7
    assert list(forecast.PEERS) == list(remote.VARIABLES)
    assert [remote.VARIABLES[name] for name in forecast.PEERS] == [f"APV_FAST_PEER_{n.upper()}" for n in forecast.PEERS]


LENGTH = 10  # two iterations of a scan; with it inductor has put one gradient into another's memory


class Filtering:
    """A problem of the rivals in float64, with the reference's outputs and gradients."""

    def __init__(self) -> None:
        sizes = Sizes(3, LENGTH, 5, 2, 3, 7, 6, 2, 5)
        tensors = make_problem(sizes, torch.float64)
        params, self.latent = params_of(tensors), Latent(sizes.stoch, sizes.discrete)
        self.leaves = [x.requires_grad_() for x in (*params, tensors["embed"], tensors["action"])]
        self.noise = (tensors["post_noise"], tensors["prior_noise"])
        self.inputs = (params, tensors["embed"], tensors["is_first"], tensors["action"])
        self.start = hoisted.zeros(params, self.latent, sizes.batch)
        post, prior = ops.rssm_observe(*self.inputs, latent=self.latent, noise=self.noise, backend="reference")
        self.expected = [post["deter"], post["stoch"], post["logit"], prior["stoch"], prior["logit"]]

    def check(self, got: Sequence[torch.Tensor]) -> None:
        """Values and gradients agree to float64's rounding."""
        generator = torch.Generator().manual_seed(0)
        cotangents = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in self.expected]
        for x, y in zip(got, self.expected, strict=True):
            torch.testing.assert_close(x, y)
        gradients = [torch.autograd.grad(outputs, self.leaves, cotangents) for outputs in (got, self.expected)]
        for x, y in zip(*gradients, strict=True):
            torch.testing.assert_close(x, y)


def test_the_compiled_rival_is_the_reference() -> None:
    """Hoisting changes neither values nor gradients, and all steps are one compiled function."""
    problem = Filtering()
    graphs: list[object] = []

    def count(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    step = torch.compile(hoisted.step, backend=count, dynamic=False, fullgraph=True)
    got = hoisted.observe(step, *problem.inputs, problem.latent, *problem.noise)
    assert len(graphs) == 1
    problem.check(got)
    torch.compiler.reset()


@pytest.mark.parametrize(
    "backend", ["", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)], ids=lambda name: name or "eager"
)
def test_the_scanning_rival_is_the_reference(backend: str) -> None:
    """Values and gradients of the loop, through PyTorch's own scan."""
    problem = Filtering()
    observe: Any = scanned.compiled(scanned.observe, backend) if backend else scanned.observe
    problem.check(observe(*problem.inputs, problem.latent, *problem.noise, problem.start))
    torch.compiler.reset()


def test_a_scan_does_several_steps_an_iteration() -> None:
    assert [scanned.unrolled(length) for length in (50, 25, 15, 16, 13, 1)] == [5, 5, 5, 8, 1, 1]


def _wrong(body: Any, carry: Any, xs: Any, most: int = 0, *, what: str) -> Any:
    rows = []
    for t in range(len(xs[0])):
        carry, ys = body(carry, tuple(x[t] for x in xs))
        if what == "gradients":  # of the carry
            carry = tuple(x.detach() for x in carry)
        rows.append(tuple(y + (what == "values") for y in ys))
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


@pytest.mark.parametrize("what", ["values", "gradients"])
def test_a_scan_that_is_wrong_is_noticed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanned, "scan", functools.partial(_wrong, what=what))
    with pytest.raises(scanned.ScanError, match=f"scan gives wrong {what}"):
        scanned.check.__wrapped__()


def test_a_scan_that_is_missing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch._higher_order_ops.scan", None)
    with pytest.raises(scanned.ScanError, match=r"has no torch\._higher_order_ops\.scan"):
        scanned.check.__wrapped__()


def test_this_versions_scan_can_be_used() -> None:
    scanned.check()


@pytest.mark.thorough
@pytest.mark.parametrize("concat_embed", [False, True])
def test_scans_in_place_of_an_updates_loops_are_the_reference(concat_embed: bool) -> None:
    """Both models stacked, then a roll-out with the actor from where they are; gradients of all weights that learn."""
    torch.manual_seed(0)
    lower = RSSM(5, deter=4, hidden=5, stoch=2, discrete=3, action_pad=3, dtype=torch.float64)
    width = lower.feat_dim + concat_embed * 5
    upper = RSSM(width, 2, deter=4, hidden=5, stoch=2, discrete=3, action_pad=3, dtype=torch.float64)
    actor = Actor(upper.feat_dim, 2, layers=1, units=4, dtype=torch.float64)
    embed, action = torch.randn(2, 4, 5, dtype=torch.float64), torch.rand(2, 4, 2, dtype=torch.float64) * 2 - 1
    shapes = [(2, 4, 2)] * 4 + [(4, 8, 2)]  # a horizon of 4 from 8 states
    noise = [100.0 * torch.nn.functional.one_hot(torch.randint(3, shape), 3).double() for shape in shapes]
    uniforms = torch.rand(4, 8, 2, dtype=torch.float64)
    is_first = torch.tensor([[True, False, False, False], [False, False, True, False]])

    def run() -> list[torch.Tensor]:
        states = StackedRSSM(lower, upper, concat_embed=concat_embed).observe(
            embed, is_first, action, af_noise=(noise[0], noise[1]), noise=(noise[2], noise[3])
        )
        start = {name: x.detach().flatten(0, 1) for name, x in states["post"].items()}
        after, actions = ops.rssm_rollout(
            upper.params(), actor.params(), start, horizon=4, latent=upper.latent, min_std=0.3, noise=noise[4],
            action_noise=uniforms,
        )  # fmt: skip
        return [x for name in sorted(states) for x in states[name].values()] + [*after.values(), actions]

    weights = [*lower.parameters(), *upper.parameters(), *actor.parameters()]
    with use_backend("reference"):
        expected = run()
        with compiled.scans():
            got = run()
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y)
    sums = [sum((i + 1) * x.sin().sum() for i, x in enumerate(outputs)) for outputs in (got, expected)]
    for x, y in zip(*(torch.autograd.grad(total, weights) for total in sums), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(x, y)


def _losses(agent: Agent, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """One update with noise that decides every sample; the losses."""
    rows, latent, horizon = batch["reward"].numel(), agent.model.rssm.latent, agent.config.behavior.horizon
    generator = torch.Generator().manual_seed(3)

    def decided(*leading: int) -> torch.Tensor:
        classes = torch.randint(latent.discrete, (*leading, latent.stoch), generator=generator)
        return 100.0 * torch.nn.functional.one_hot(classes, latent.discrete).float()

    both = [(decided(*batch["reward"].shape), decided(*batch["reward"].shape)) for _ in range(2)]
    model = agent.model.loss(batch, StackNoise(*both))
    agent._step(model.loss, "model", "video")
    uniforms = torch.rand(horizon, rows, 4, generator=generator)
    noise = ImaginationNoise(decided(horizon, rows), uniforms)
    actor, critic, _ = agent.behavior.losses(agent.model, model.post, batch["is_terminal"], noise)
    agent._step(actor + critic, "actor", "critic")
    return [model.loss, actor, critic]


def small_agents(count: int) -> tuple[dict[str, torch.Tensor], list[Agent]]:
    """A batch, and agents with the same weights."""
    batch, config = finetune_setup(CPU, torch.float32, B=1, T=6, horizon=2, deter=6, hidden=5, cnn_depth=1)
    config = replace(config, backend="reference", graph="off")
    config = replace(config, model=replace(config.model, stoch=2, discrete=3))
    torch.manual_seed(0)
    agents = [Agent(config, 4, discrete=False, device=CPU) for _ in range(count)]
    with torch.no_grad():
        for other in agents[1:]:
            for x, y in zip(other.tensors(), agents[0].tensors(), strict=True):
                x.copy_(y)
    return batch, agents


@pytest.mark.thorough
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_compiled_update_is_the_references(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, gradients, and the weights after a step of Adam; from two graphs of losses and one of each optimiser."""
    batch, agents = small_agents(2)
    graphs: list[str] = []
    compile_ = torch.compile

    def counted(function: Any, **options: Any) -> Any:
        if options["backend"] != backend:  # what a scan outside of a compiled function does by itself
            return compile_(function, **options)
        assert options["fullgraph"]
        name = getattr(function, "__name__", type(function).__name__)
        made = torch._dynamo.lookup_backend(backend)

        def count(graph: Any, example: Any, **more: Any) -> Any:
            graphs.append(name)
            return made(graph, example, **more)

        return compile_(function, **options | {"backend": count})

    if backend == "eager":
        monkeypatch.setattr(torch, "compile", counted)
    compiled.compile_update(agents[1], backend)
    expected, got = (_losses(agent, batch) for agent in agents)
    if backend == "eager":
        assert len(graphs) == 2 + len(agents[1].optimizers) and graphs.count("loss") == graphs.count("losses") == 1
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    for x, y in zip(agents[1].tensors(), agents[0].tensors(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    # Of the world model these are of its own loss still: the actor's has none for it.
    for module in ("model", "behavior"):
        weights = zip(*(getattr(agent, module).parameters() for agent in reversed(agents)), strict=True)
        for x, y in weights:
            assert (x.grad is None) == (y.grad is None)
            if y.grad is not None:
                torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-4)
    torch.compiler.reset()


@pytest.mark.thorough
def test_a_compiled_update_makes_noise_of_its_own() -> None:
    """As it is timed: whole updates, without noise from outside."""
    batch, agents = small_agents(2)
    compiled.compile_update(agents[1], "eager")
    for _ in range(2):
        right, found = (agent.update(batch) for agent in agents)
        assert found.keys() == right.keys() and all(x.isfinite() for x in found.values())
        assert float(found["image_loss"]) == pytest.approx(float(right["image_loss"]), rel=0.02)
    torch.compiler.reset()

"""What ``python -m bench.device`` measures: its own kernels, and contests, on the CPU with tiny sizes."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("bench", reason="bench/ is not installed; it runs from a checkout")
from apv_fast import ops
from apv_fast.backend import IMPLEMENTATIONS, BackendError, probe
from apv_fast.ops import Latent
from bench import timing
from bench.gpu import barrier, contests, hoisted, pointwise, scans, updates, work
from bench.gpu.checkout import ROOT, environment
from bench.gpu.contests import Contest, Passes
from bench.gpu.graphs import CaptureError
from bench.registry import COMPILED
from tests import cooperative
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

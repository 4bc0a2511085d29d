"""The kernels that ``python -m bench.device`` measures with, and its test of the grid barrier."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("bench", reason="bench/ is not installed; it runs from a checkout")
from apv_fast.backend import probe
from bench.gpu import (
    barrier,
)  # fmt: skip
from bench.gpu.checkout import ROOT, environment
from tests.support import cooperative
from tests.support.checkouts import run_python

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
from tests.support import fake_gpu
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

"""Every CUDA source compiles for the GPUs it is meant for, without spilling, on a machine that has none."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from apv_fast import cuda
from apv_fast.backend import probe
from apv_fast.cuda.parts.library import Sample, Scan
from tests.support import ROOT

CSRC = ROOT / "csrc" / "cuda"
SOURCES = [*sorted(CSRC.glob("*.cu")), CSRC.parent.parent / "bench" / "gpu" / "barrier.cu"]
FOLDERS = (os.environ.get("CUDA_HOME", "/usr/local/cuda"), f"{sysconfig.get_path('purelib')}/nvidia/cu13")
NVCC = shutil.which("nvcc") or next((path for f in FOLDERS if (path := shutil.which(f"{f}/bin/nvcc"))), None)
if NVCC is None:
    pytest.skip("there is no nvcc: .ci/install gets it, or set CUDA_HOME to a toolkit", allow_module_level=True)


@dataclass(frozen=True)
class Kernel:
    """What ptxas reports of one kernel."""

    name: str
    stack: int  # bytes
    spills: int  # bytes
    registers: int  # a thread


@dataclass(frozen=True)
class Compiled:
    kernels: tuple[Kernel, ...]
    ptx: str


def compile_source(source: Path, arch: str, folder: Path) -> Compiled:
    folder.mkdir()
    command = [str(NVCC), "-std=c++17", "-O3", f"-arch={arch}", "-cubin", "-Xptxas", "-v", "--keep", "--keep-dir"]
    command += [str(folder), f"-I{CSRC}", str(source), "-o", str(folder / "out.cubin")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr.lower(), result.stderr
    pattern = (
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers"
    )
    kernels = tuple(
        Kernel(name, int(stack), int(stores) + int(loads), int(registers))
        for name, stack, stores, loads, registers in re.findall(pattern, result.stderr, re.DOTALL)
    )
    return Compiled(kernels, next(folder.glob("*.ptx")).read_text())


KERNELS = {"scan_forward": 3, "scan_backward": 3, "sample": 2, "barrier": 2}
# The two newest generations are compiled whole by hand; every time, for one of them, what takes a quarter of that.
SOME = [("scan_forward", "sm_120")]


def jobs(*sources: str) -> list[Any]:
    """Sources and architectures as parameters, those that take long marked so."""
    return [
        pytest.param(source, arch, marks=[pytest.mark.slow] if late and (source, arch) not in SOME else [])
        for source in sources
        for major, arch in cuda.ARCHITECTURES.items()
        for late in [major >= 10]
    ]


@pytest.fixture(scope="module")
def compiled(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Callable[[str, str], Compiled]]:
    """By source and architecture; the two processors of a small machine share the work."""
    folder = tmp_path_factory.mktemp("nvcc")
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    wanted = dict.fromkeys((item.callspec.params["source"], item.callspec.params["arch"]) for item in items)
    sources = {source.stem: source for source in SOURCES}
    with ThreadPoolExecutor(2) as pool:
        libraries = {
            job: pool.submit(compile_source, sources[job[0]], job[1], folder / "-".join(job)) for job in sorted(wanted)
        }
        yield lambda source, arch: libraries[source, arch].result()


@pytest.mark.thorough
@pytest.mark.parametrize(("source", "arch"), jobs(*KERNELS))
def test_no_spills(compiled: Callable[[str, str], Compiled], source: str, arch: str) -> None:
    kernels = compiled(source, arch).kernels
    assert len(kernels) == KERNELS[source]
    for kernel in kernels:
        assert kernel.spills == 0 and kernel.stack == 0, kernel
        assert kernel.registers <= 255, kernel


@pytest.mark.thorough
@pytest.mark.parametrize(("source", "arch"), jobs("scan_forward", "scan_backward"))
def test_scans_use_the_tensor_cores_and_order_their_barriers(
    compiled: Callable[[str, str], Compiled], source: str, arch: str
) -> None:
    ptx = compiled(source, arch).ptx
    for instruction in (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        "red.release.gpu.global.add.u32",
        "ld.acquire.gpu.global.u32",
        "ld.global.cg.v4.u32",
    ):
        assert instruction in ptx, instruction
    assert "__local_depot" not in ptx  # an array that ended up in memory


def test_structures_agree() -> None:
    """The fields of scan.h and sample.h, in the order of the Python side's."""
    for header, structure in (("scan.h", Scan), ("sample.h", Sample)):
        text = re.sub(r"//.*", "", (CSRC / header).read_text())
        body = re.findall(rf"struct Apv{structure.__name__} \{{(.*?)\}};", text, re.DOTALL)[0]
        declared = [
            re.sub(r".*[\s*]", "", name.strip()) for line in body.split(";") if line.strip() for name in line.split(",")
        ]
        assert declared == [name for name, *_ in structure._fields_]


def test_the_library_loads_without_a_driver() -> None:
    if not cuda.PATH.exists():
        pytest.skip(f"{cuda.PATH.name} is not built: APV_FAST_CUDA was off, or the installation found no nvcc")
    library = cuda.library()
    assert library.c.apv_scan_bytes() == ctypes.sizeof(Scan)
    known = subprocess.run([str(NVCC), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    numbers = [int(arch.strip("sm_a")) for arch in cuda.ARCHITECTURES.values()]
    assert library.architectures() == tuple(number for number in numbers if f"sm_{number}" in known)
    if not probe("cuda").available:
        scan = Scan(batch=1, length=1, deter=8, hidden=8, stoch=1, discrete=2)
        assert library.probe() == library.plan("forward", scan) != ""

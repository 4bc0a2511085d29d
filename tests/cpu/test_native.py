"""The C++ extension as a piece of software: memory, processes, threads, and what its object files contain."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from apv_fast.backend import probe
from tests.support import ROOT

if not probe("cpu").available:
    pytest.skip(f"cpu: {probe('cpu').reason}", allow_module_level=True)

from apv_fast import _C
from apv_fast.cpu.knn_bonus import knn_bonus_and_memory
from apv_fast.ops import knn_bonus

CSRC = ROOT / "csrc"
MEBIBYTE = 2**20
_AVX2 = ["-mavx2", "-mfma"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
ISA_FLAGS = {"scalar": [], "avx2": _AVX2, "avx512": _AVX512, "avx512bf16": [*_AVX512, "-mavx512bf16"]}


def run_python(code: str) -> str:
    """Standard output of a new process, which hangs at most a minute."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("isa", _C.supported_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_working_memory(dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APV_FAST_CPU_ISA", isa)
    x = torch.randn(4096, 128).to(dtype)
    _, memory = knn_bonus_and_memory(x[:2300], x, 16, "mean")
    assert memory < 4 * MEBIBYTE


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_the_process() -> None:
    # The [Q, N] matrix alone would be 36 MiB.
    code = """
import torch
from apv_fast.ops import knn_bonus
def memory(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))
x = torch.randn(4096, 128)
query = x[:2300].clone()
knn_bonus(query[:500], x[:100], backend="cpu")  # starts the threads
open("/proc/self/clear_refs", "w").write("5")  # resets the peak
before = memory("VmRSS")
knn_bonus(query, x, backend="cpu")
print((memory("VmHWM") - before) / 1024)
"""
    assert float(run_python(code)) < 4


def test_after_fork() -> None:
    run_python("""
import os, torch
from apv_fast.ops import knn_bonus
torch.set_num_threads(2)
x = torch.randn(700, 20)
expected = knn_bonus(x, x, backend="cpu")  # OpenMP's threads exist now, and do not survive the fork
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(knn_bonus(x, x, backend="cpu"), expected) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(knn_bonus(x, x, backend="cpu"), expected)
""")


def test_first_use_after_fork() -> None:
    """The child loads the extension, in a process whose threads torch had started and the fork has ended."""
    run_python("""
import os, signal, sys, torch
import apv_fast
torch.set_num_threads(2)
torch.ones(3000, 3000).exp()
assert "apv_fast._C" not in sys.modules
child = os.fork()
if child == 0:
    signal.alarm(30)  # ends it
    x = torch.ones(700, 20)
    apv_fast.ops.knn_bonus(x, x, backend="cpu")
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
""")


@pytest.mark.skipif(sys.platform != "linux" or not _C.openmp, reason="looks for libgomp in /proc")
def test_one_openmp_runtime() -> None:
    code = """
import torch
from apv_fast.ops import knn_bonus
x = torch.randn(700, 20)
knn_bonus(x, x, backend="cpu")
print(*{line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line or "libomp" in line}, sep="\\n")
"""
    assert len(run_python(code).split()) == 1


def test_other_python_threads_run_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APV_FAST_CPU_ISA", "scalar")
    x = torch.randn(6000, 256, dtype=torch.float64)  # half a second of work
    turns = 0
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(knn_bonus, x, x, backend="cpu")
        while not future.done():
            time.sleep(0.001)
            turns += 1
    assert turns > 20


def test_bad_calls_do_not_touch_memory() -> None:
    def call(**changes: object) -> None:
        good = {"query": 0, "query_shape": (3, 2), "query_strides": (2, 1)}
        good |= {"keys": 0, "keys_shape": (4, 2), "keys_strides": (2, 1), "out": 0, "k": 1}
        good |= {"mean": True, "dtype": "float32", "threads": 1}
        _C.knn_bonus(**{**good, **changes})  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="at least one key"):
        call(keys_shape=(0, 2))
    with pytest.raises(ValueError, match="k >= 1"):
        call(k=0)
    with pytest.raises(ValueError, match="as many columns"):
        call(keys_shape=(4, 3))
    with pytest.raises(ValueError, match="dtype 'int8' is not supported"):
        call(dtype="int8")


def kernels() -> list[str]:
    """The files that CMakeLists.txt compiles once for every instruction set."""
    listed = re.search(r"set\(KERNELS\s([^)]*)\)", (CSRC.parent / "CMakeLists.txt").read_text())
    assert listed is not None
    return listed[1].split()


def exported(target: Path) -> list[str]:
    """The symbols of an object file that the linker may use for another file."""
    symbols = subprocess.run(["nm", "-C", "--defined-only", target], capture_output=True, text=True, check=True).stdout
    pairs = [line.split(maxsplit=2)[-2:] for line in symbols.splitlines()]
    return [name for kind, name in pairs if kind.isupper() or kind in "wvu"]


ABLE = [isa for isa in _C.supported_isas() if isa in ISA_FLAGS]
SLOW = [pytest.param(isa, marks=pytest.mark.slow) for isa in ABLE[1:]]  # the rest: they differ in few lines


# A weak symbol in code for a newer CPU could become the program's only copy: an illegal instruction on older ones.
@pytest.mark.thorough
@pytest.mark.parametrize("isa", [*ABLE[:1], *SLOW])
def test_object_files_share_no_code(isa: str, tmp_path: Path) -> None:
    """Without optimisation, where nothing is inlined that need not be."""
    compiler = shutil.which("c++")
    if not (compiler and shutil.which("nm") and CSRC.is_dir()):
        pytest.skip("needs a compiler and csrc/")
    flags = ["-std=c++17", "-fPIC", "-O0", "-fopenmp", "-fno-exceptions", "-w", "-DAPV_FAST_X86"]

    def names(file: str) -> list[str]:
        target = tmp_path / f"{file.replace('/', '_')}.o"
        ours = [*flags, *ISA_FLAGS[isa], f"-DAPV_FAST_ISA={isa}"]
        subprocess.run([compiler, *ours, "-c", CSRC.parent / file, "-o", target], check=True)
        return exported(target)

    files = kernels()
    assert len(files) > 10
    with ThreadPoolExecutor(2) as pool:
        for file, symbols in zip(files, pool.map(names, files), strict=True):
            own = [name for name in symbols if name.startswith(f"apv_fast::{isa}::")]
            assert own and symbols == own, (file, symbols)

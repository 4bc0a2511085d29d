"""Latency and stress of the grid barriers: Triton's, and the CUDA kernels' where nvcc is.

The CUDA side is compiled here from ``barrier.cu`` and the very header that the scan uses.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from bench.gpu.build import architecture
from bench.gpu.ceilings import events
from bench.gpu.checkout import ROOT, environment

KINDS = ("triton", "cuda")
# Wrong orders to plant in the stress tests, barrier_kernels.py and barrier.cu.
FAULTS = {
    "every seventh barrier is missing": 1,
    "the last program is not waited for": 2,
    "stores come after the barrier": 3,
}
DEVICE = "cuda"
LATENCY_ROUNDS = 2000
THREADS = 256  # of barrier.cu


def programs() -> int:
    """One a multiprocessor, as the scan has."""
    return int(torch.cuda.get_device_properties(0).multi_processor_count)


def _zero(count: int = 1) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=DEVICE)


def compile_cuda(folder: Path, capability: tuple[int, int]) -> Path:
    """The library of barrier.cu for a GPU of ``capability``; compiled once, however many processes ask for it.

    Raises:
        RuntimeError: there is no nvcc, or it fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arch = architecture(capability)
    sources = [ROOT / "bench" / "gpu" / "barrier.cu", ROOT / "csrc" / "cuda" / "barrier.h"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    library = folder / f"barrier-sm{arch}-{digest}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _nvcc(sources[0], arch, library)
    return library


def _nvcc(source: Path, arch: str, library: Path) -> None:
    env = environment()
    nvcc = shutil.which("nvcc", path=env["PATH"])
    if nvcc is None:
        raise RuntimeError("nvcc is not on the path")
    part = library.with_suffix(".part")  # a process that is killed leaves no half of a library
    command = [nvcc, "-O3", "-std=c++17", "-gencode", f"arch=compute_{arch},code=sm_{arch}", "-shared"]
    command += ["-Xcompiler", "-fPIC", f"-I{ROOT / 'csrc' / 'cuda'}", str(source), "-o", str(part)]
    process = subprocess.run(command, capture_output=True, text=True, env=env)
    if process.returncode:
        raise RuntimeError(f"nvcc: {process.stderr.strip().partition(chr(10))[0]}")
    os.replace(part, library)


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(compile_cuda(ROOT / "build" / "device-barrier", torch.cuda.get_device_capability())))


def _call(name: str, *arguments: Tensor | int) -> None:
    """A function of the library, on torch's current stream."""
    values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int(a) for a in arguments]
    error = getattr(_library(), name)(*values, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
    if error:
        raise RuntimeError(f"{name}: CUDA error {error}")


def _triton_rounds(rounds: int) -> None:
    from bench.gpu.barrier_kernels import WARPS, latency_kernel

    latency_kernel[(programs(),)](_zero(), rounds, num_warps=WARPS, launch_cooperative_grid=True)


def _cuda_rounds(rounds: int) -> None:
    _call("barrier_latency", _zero(), programs(), rounds)


def _triton_stress(rounds: int, fault: int) -> int:
    from bench.gpu.barrier_kernels import BLOCK, LATE, WARPS, stress_kernel

    rows, wrong = _zero(2 * programs() * BLOCK), _zero()
    stress_kernel[(programs(),)](
        _zero(), rows, wrong, rounds, FAULT=fault, BLOCK=BLOCK, LATE=LATE, num_warps=WARPS,
        launch_cooperative_grid=True,
    )  # fmt: skip
    return int(wrong)


def _cuda_stress(rounds: int, fault: int) -> int:
    rows, wrong = _zero(2 * programs() * THREADS), _zero()
    _call("barrier_stress", _zero(), rows, wrong, programs(), rounds, fault)
    return int(wrong)


def stress(kind: str, rounds: int, fault: str = "") -> int:
    """Reads of a wrong round in ``rounds`` rounds of a barrier of :data:`KINDS`, with one of :data:`FAULTS` planted."""
    run = {"triton": _triton_stress, "cuda": _cuda_stress}[kind]
    return run(rounds, FAULTS[fault] if fault else 0)


def latency(kind: str) -> dict[str, float]:
    """Microseconds a barrier of one block a multiprocessor: the time of many rounds less that of one."""
    rounds = {"triton": _triton_rounds, "cuda": _cuda_rounds}[kind]
    many, one = (events(functools.partial(rounds, count)) for count in (LATENCY_ROUNDS + 1, 1))
    return {f"barrier_{kind}_us": 1e3 * (many - one) / LATENCY_ROUNDS}

"""What GPU this is, and ``apv_fast/_cuda.so`` for it: the one that is here if it loads, else nvcc's for this GPU alone.

The library has a plain C interface, so one that was built elsewhere, under another Python, serves. The C++ extension
for CPUs is not built: nothing that runs on a GPU needs it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu.checkout import ROOT, environment

LOOK_SECONDS = 60.0  # to import torch from a cold disk and start CUDA
LIBRARY = ROOT / "apv_fast" / "_cuda.so"
SOURCES = ("scan_forward", "scan_backward", "sample")
# Asked in another process, so that this one never holds the device.
LOOK = """
import bench.gpu.checkout, json, torch
from pathlib import Path
from apv_fast.cuda import PATH
from apv_fast.cuda.parts.library import Library
try:
    library, why = bool(Library(PATH)), ""
except OSError as error:
    library, why = False, str(error)
gpu = torch.cuda.is_available()
name = torch.cuda.get_device_name(0) if gpu else ""
capability = torch.cuda.get_device_capability() if gpu else (9, 0)
print(json.dumps({"gpu": name, "capability": capability, "library": library, "why": why}))
"""


@dataclass(frozen=True)
class Probe:
    """What is here."""

    gpu: str  # its name; "" without one
    capability: tuple[int, int] = (9, 0)
    library: bool = False  # whether apv_fast/_cuda.so loads
    why: str = ""  # it does not


def look(seconds: float = LOOK_SECONDS) -> Probe:
    """Ask PyTorch.

    Raises:
        RuntimeError: it cannot say, or does not in ``seconds``; the last line of its error.
    """
    command = [sys.executable, "-c", LOOK]
    try:
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(), timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"no answer in {seconds:.0f} s") from error
    if process.returncode:
        raise RuntimeError((process.stderr.strip().splitlines() or [f"exit status {process.returncode}"])[-1])
    said = json.loads(process.stdout.strip().splitlines()[-1])
    return Probe(said["gpu"], tuple(said["capability"]), said["library"], said["why"])


def architecture(capability: tuple[int, int]) -> str:
    """nvcc's name of a GPU, "80", "90a", "120", as the library that is shipped has it.

    The "a" lets code use what only that one GPU has. Nothing here does: for 9.0, 10.0 and 12.0 alike nvcc makes the
    same PTX with it and without.
    """
    major, minor = capability
    return f"{major}{minor}{'a' if major == 9 else ''}"


def build(probe: Probe, log: Path, seconds: float) -> dict[str, Any]:
    """See that ``apv_fast/_cuda.so`` loads, within ``seconds``.

    Returns:
        "seconds", "nvcc" (its version or ""), "library" (what it is), and "error" if there is none that loads.
    """
    start, env = time.monotonic(), environment()
    result: dict[str, Any] = {"nvcc": nvcc_version(env)}
    if probe.library:
        return result | {"library": f"found, sha256 {_digest()}", "seconds": 0.0}
    arch = architecture(probe.capability)
    try:
        compile_library(arch, ROOT / "build" / f"device-cuda-sm{arch}", log, seconds)
        result["library"] = f"built for sm_{arch} ({probe.why or 'there was none'}), sha256 {_digest()}"
    except (OSError, RuntimeError) as error:
        result["error"] = f"the CUDA C++ library: {error}"[:600]
    return result | {"seconds": round(time.monotonic() - start, 1)}


def compile_library(arch: str, folder: Path, log: Path, seconds: float) -> None:
    """nvcc on all sources at once, for one architecture; then in place under its name, whole.

    Raises:
        RuntimeError: there is no nvcc, or it fails, or is not done in ``seconds``.
    """
    env = environment()
    nvcc = shutil.which("nvcc", path=env["PATH"])
    if nvcc is None:
        raise RuntimeError("nvcc is not on the path")
    folder.mkdir(parents=True, exist_ok=True)
    end, home = time.monotonic() + seconds, Path(nvcc).resolve().parent.parent
    static = [f"-L{home / name}" for name in ("lib64", "lib") if (home / name / "libcudart_static.a").exists()]
    flags = [nvcc, "-std=c++17", "-O3", "-cudart", "static", "-Xcompiler=-fPIC,-fvisibility=hidden", *static]
    flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    objects = [str(folder / f"{name}.o") for name in SOURCES]
    sources = [str(ROOT / "csrc" / "cuda" / f"{name}.cu") for name in SOURCES]
    _run([[*flags, "-c", source, "-o", out] for source, out in zip(sources, objects, strict=True)], log, end)
    part = folder / "_cuda.so"
    _run([[*flags, "-shared", *objects, "-o", str(part)]], log, end)
    beside = LIBRARY.with_name(f"_cuda.{os.getpid()}.part")
    shutil.copyfile(part, beside)
    os.replace(beside, LIBRARY)


def _run(commands: Sequence[Sequence[str]], log: Path, end: float) -> None:
    """Programs side by side until ``time.monotonic()`` is ``end``."""
    with log.open("ab") as output:
        running = [subprocess.Popen(command, stdout=output, stderr=output, env=environment()) for command in commands]
        try:
            for process in running:
                process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            raise RuntimeError("nvcc was not done when the time was up") from error
        finally:
            for process in running:
                process.kill()
                process.wait()
    if any(process.returncode for process in running):
        last = [line for line in log.read_text(errors="replace").splitlines() if "error" in line.lower()][-3:]
        raise RuntimeError(f"nvcc: {' | '.join(last) or 'see the log'}")


def _digest() -> str:
    return hashlib.sha256(LIBRARY.read_bytes()).hexdigest()[:12]


def nvcc_version(env: dict[str, str]) -> str:
    """The release of the nvcc on the path, or "" without one."""
    nvcc = shutil.which("nvcc", path=env["PATH"])
    if nvcc is None:
        return ""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return next((line.strip() for line in text.splitlines() if "release" in line), "unknown")

"""Builds the checkout in place, as an editable installation would, without installing anything.

CMake puts the C++ extension, and the CUDA library where nvcc is, into ``apv_fast/``; nothing is downloaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

from bench.gpu.checkout import ROOT, environment

TOOLS = ("cmake", "ninja")


def commands(folder: Path) -> list[list[str]]:
    """What is run, in order: configure, compile, put in place."""
    import pybind11

    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
        *(f"-DCMAKE_INSTALL_PREFIX={ROOT / 'apv_fast'}", f"-DPython_EXECUTABLE={sys.executable}"),
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    return [configure, ["cmake", "--build", str(folder)], ["cmake", "--install", str(folder)]]


def build(log: Path, seconds: float) -> dict[str, Any]:
    """Build within ``seconds``; the result says what was made, or what failed.

    Returns:
        "seconds", "nvcc" (its version or ""), and "error" if something failed: the last lines of the failing command.
    """
    start = time.monotonic()
    env = environment()
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"  # pip puts cmake and ninja there
    result: dict[str, Any] = {"nvcc": nvcc_version(env)}
    missing = [tool for tool in TOOLS if shutil.which(tool, path=env["PATH"]) is None]
    if missing:
        return result | {"error": f"not found: {', '.join(missing)}", "seconds": 0.0}
    folder = ROOT / "build" / f"device-{sysconfig.get_platform()}-{sys.version_info.major}.{sys.version_info.minor}"
    try:
        for command in commands(folder):
            left = seconds - (time.monotonic() - start)
            with log.open("ab") as output:
                subprocess.run(command, check=True, stdout=output, stderr=subprocess.STDOUT, env=env, timeout=left)
    except ImportError as error:
        result["error"] = str(error)
    except subprocess.TimeoutExpired:
        result["error"] = f"took more than {seconds:.0f} s"
    except (OSError, subprocess.CalledProcessError) as error:
        last = [line for line in log.read_text(errors="replace").splitlines() if "error" in line.lower()][-3:]
        result["error"] = f"{error}: {' | '.join(last)}"[:600]
    return result | {"seconds": round(time.monotonic() - start, 1)}


def nvcc_version(env: dict[str, str]) -> str:
    """The release of the nvcc on the path, or "" without one."""
    nvcc = shutil.which("nvcc", path=env["PATH"])
    if nvcc is None:
        return ""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return next((line.strip() for line in text.splitlines() if "release" in line), "unknown")

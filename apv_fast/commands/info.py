"""``apv-fast info``: versions, devices, backends and which of them run, to paste into a bug report."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

import apv_fast
from apv_fast.backend import BackendError, requested
from apv_fast.commands.parts.backend_report import auto_backends, gpu_facts, triton_scan
from apv_fast.config import InfoConfig

_PACKAGES = ("numpy", "triton", "gymnasium", "mujoco", "dm_control", "metaworld", "tensorboard", "matplotlib")


def info(config: InfoConfig) -> None:
    """Print the report."""
    print(report())


def report() -> str:
    """A fact a line."""
    lines = [f"apv-fast {apv_fast.__version__}", f"Python {platform.python_version()} on {platform.platform()}"]
    lines.append(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU {torch.backends.cpu.get_cpu_capability()}"
    )
    lines += [f"{name} {_version(name)}" for name in _PACKAGES]
    gpus = range(torch.cuda.device_count())
    lines += [gpu_facts(index) for index in gpus] or ["no GPU that torch sees"]
    lines += [
        f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith(("APV_FAST_", "MUJOCO_GL"))
    ]
    try:
        requested(None)
    except BackendError as error:
        lines.append(str(error))
    lines += [f"backend {backend}" for backend in apv_fast.backends().values()]
    lines += [f"auto takes {line}" for line in auto_backends()]
    for index in gpus:
        try:
            lines += triton_scan(torch.device("cuda", index))
        except BackendError as error:
            lines.append(str(error))
    lines.append(
        "updates: " + ("one CUDA graph each on a GPU, --graph off for eager ones" if gpus else "eager (no GPU)")
    )
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"

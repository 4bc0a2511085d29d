"""Kernels in CUDA C++ (``csrc/cuda/``), in a library of their own with a plain C interface.

CMake builds ``apv_fast/_cuda.so`` where it finds nvcc, unless ``APV_FAST_CUDA`` is off. Limits: bfloat16 weights; GPUs
of compute capability 8, 9.0, 10 and 12, each generation in the code of its first one, with cooperative launch.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from apv_fast.backend import Status
from apv_fast.cuda.parts.library import Library

PATH = Path(__file__).resolve().parent.parent / "_cuda.so"
ARCHITECTURES = {8: "sm_80", 9: "sm_90a", 10: "sm_100", 12: "sm_120"}  # by the compute capability's first number


@functools.cache
def library() -> Library:
    """The installed library.

    Raises:
        OSError: it is not there, or cannot be loaded.
    """
    return Library(PATH)


def probe() -> Status:
    """Whether the kernels can run here, and if not, what to do about it. Never raises."""
    if not torch.cuda.is_available():
        return Status(
            False,
            "torch finds no CUDA device, and there are no CUDA C++ kernels without one; use 'auto' or 'reference'",
        )
    major, minor = torch.cuda.get_device_capability()
    if major not in ARCHITECTURES:
        why = f"there is no code for compute capability {major}.{minor}, only for {', '.join(ARCHITECTURES.values())}"
        return Status(False, f"{why}; use 'triton' or 'reference'")
    if not PATH.exists():
        how = "install a CUDA toolkit (nvcc on PATH, or CUDA_HOME), then `pip install` apv-fast again"
        return Status(False, f"the CUDA C++ kernels are not built: {how}; or use 'triton' or 'reference'")
    isa = ARCHITECTURES[major]
    try:
        obstacle = library().probe()
        if major not in {number // 10 for number in library().architectures()}:
            obstacle = (
                f"{PATH.name} has no code for {isa}, which its nvcc did not know: install apv-fast with a newer one"
            )
    except OSError as error:
        return Status(False, f"{error}; use 'triton' or 'reference'")
    if obstacle:
        return Status(False, f"{obstacle}; use 'triton' or 'reference'")
    return Status(True, devices=("cuda",), isa=isa, dtypes=(torch.bfloat16,))

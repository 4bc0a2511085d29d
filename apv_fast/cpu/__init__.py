"""Ops in C++ for the CPU (``csrc/``), on the fastest instruction set that the machine has.

``APV_FAST_CPU_ISA`` = scalar | avx2 | avx512 | avx512bf16 picks another one. Limits: Linux and GCC or Clang; tensors on
the CPU.
"""

from __future__ import annotations

import warnings

# Before _C: both link OpenMP's libgomp.so.1, and the copy that is loaded first (torch brings its own) serves both. A
# second one would bring a second set of threads.
import torch

from apv_fast.backend import Status

try:
    from apv_fast import _C
except ImportError as error:
    _import_error: str | None = str(error)
else:
    _import_error = None

ISA_VARIABLE = "APV_FAST_CPU_ISA"  # _C.isa reads it


def isa() -> str:
    """The instruction set in use.

    Raises:
        ValueError: the environment asks for one that is unknown or cannot run here.
    """
    return _C.isa()


def probe() -> Status:
    """Whether the C++ extension is there, else a warning, and which instruction set it uses. Never raises."""
    if _import_error is not None:
        reason = (
            f"the C++ extension is not built ({_import_error}): install a C++17 compiler and Python's headers (Debian: "
            "build-essential python3-dev), then `pip install` apv-fast again"
        )
        # pip hides what the build printed. The table asks once in a process.
        warnings.warn(f"apv-fast runs on the reference (plain PyTorch) on the CPU: {reason}", stacklevel=2)
        return Status(False, reason)
    try:
        name = isa()
    except ValueError as error:
        return Status(False, str(error))
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    return Status(True, devices=("cpu",), isa=name, dtypes=dtypes)

"""Triton kernels, one module an op; installed as ``apv_fast.kernels``.

Importing this package does not import Triton: a module of it does, and only when its cell in the table of
``apv_fast.backend`` is used. ``python -m apv_fast.kernels.aot`` compiles every kernel for a GPU that need not be here.

Limits: NVIDIA GPUs, and the Triton interpreter (``TRITON_INTERPRET=1``) on the CPU, which is for tests: it is slow.
"""

from __future__ import annotations

import importlib.util
import os

if __name__ != "apv_fast.kernels":
    # From the repository's root `import kernels` finds this folder too: a second copy of every module, whose kernels
    # and op registrations would clash with those of the first.
    raise ImportError(f"this package is apv_fast.kernels, not {__name__}: use `import apv_fast.kernels`")

import torch

from apv_fast.backend import Status

OLDEST = (8, 0)  # compute capability: bfloat16 products and asynchronous copies
_TRUE = frozenset({"1", "true", "on", "yes", "y"})  # what Triton itself reads as true


def interpreting() -> bool:
    """Whether the environment asks Triton to interpret kernels on the CPU instead of compiling them.

    Triton reads the variable when it is imported, so it must be set before that.
    """
    return os.environ.get("TRITON_INTERPRET", "").strip().lower() in _TRUE


def probe() -> Status:
    """Whether Triton kernels can run here, on which devices, and if not, what to do about it. Never raises."""
    if importlib.util.find_spec("triton") is None:
        return Status(False, "Triton is not installed: `pip install triton` (the CPU build of torch does not bring it)")
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    if interpreting():
        return Status(True, devices=("cpu",), isa="interpreter", dtypes=dtypes)
    if not torch.cuda.is_available():
        return Status(
            False,
            "torch finds no CUDA device; use 'auto' or 'reference', or set TRITON_INTERPRET=1 before Triton is "
            "imported to run the kernels in its (slow) interpreter",
        )
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < OLDEST:
        needed = "".join(map(str, OLDEST))
        return Status(False, f"the GPU is sm_{major}{minor}; the kernels need sm_{needed} or newer; use 'reference'")
    return Status(True, devices=("cuda",), isa=f"sm_{major}{minor}", dtypes=dtypes)

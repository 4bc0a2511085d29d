"""The CUDA C++ backend's place in the table; no op has an implementation in it yet."""

from __future__ import annotations

from apv_fast.backend import Status


def probe() -> Status:
    """Not available: this version has no CUDA C++ kernels."""
    return Status(False, "this version of apv-fast has no CUDA C++ kernels; use 'triton' or 'reference' on a GPU")

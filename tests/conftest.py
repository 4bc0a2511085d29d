"""What must be set before any test module is imported."""

from __future__ import annotations

import os

import pytest
import torch

GPU_BACKENDS = ("triton", "cuda")

if not torch.cuda.is_available():
    # Without a GPU, Triton's kernels run in its interpreter. Triton reads this when it is imported, so it cannot wait
    # for a fixture. Tests that need the compiler start a process without it.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``-m gpu`` selects what is marked so, and every test that has a backend for GPUs as a parameter."""
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(isinstance(value, str) and value.startswith(GPU_BACKENDS) for value in parameters):
            item.add_marker("gpu")

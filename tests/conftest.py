"""What must be set before any test module is imported."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # a process a core: OpenMP, which torch starts, is to know before that
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from typing import Any

import numpy as np
import pytest
import torch

GPU_BACKENDS = ("triton", "cuda")

if not torch.cuda.is_available():
    # Without a GPU, Triton's kernels run in its interpreter. Triton reads this when it is imported, so it cannot wait
    # for a fixture. Tests that need the compiler start a process without it.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def patch_once() -> None:
    """Let Triton's interpreter patch the language once a launch and not in every device function called: 2 ms each."""
    try:
        from triton import language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    original = interpreter._patch_lang
    patched: set[str] = set()  # in the launch that runs

    class Nested:
        def restore(self) -> None:
            pass

    def patch(fn: Any) -> Any:
        modules = {name for name, module in (("tl", tl), ("core", tl.core)) if module in fn.__globals__.values()}
        if patched and modules <= patched:
            return Nested()
        launch, scope = not patched, original(fn)
        patched.update(modules)
        restore = scope.restore

        def end() -> None:
            patched.clear()
            restore()

        if launch:
            scope.restore = end
        return scope

    interpreter._patch_lang = patch


def round_once() -> None:
    """Products in Triton's interpreter are exact up to one rounding: NumPy's BLAS has other sums on every CPU."""
    try:
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    except ImportError:
        return
    original = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if any(x.data.dtype != np.float32 for x in (a, b, d)):
            return original(self, a, b, d, *rest)
        wide = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
        return TensorHandle(wide.astype(np.float32) + d.data, d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


if os.environ.get("TRITON_INTERPRET"):
    patch_once()
    round_once()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``-m gpu`` selects what is marked so, and every test that has a backend for GPUs as a parameter.

    Of tests marked ``interpreted``, those that run in Triton's interpreter become ``thorough``: it is slow.
    """
    for item in items:
        spec = getattr(item, "callspec", None)
        parameters = () if spec is None else spec.params.values()
        if spec and any(isinstance(value, str) and value.startswith(GPU_BACKENDS) for value in parameters):
            item.add_marker("gpu")
            marker = item.get_closest_marker("interpreted")
            kept = marker is None or any(part in spec.id for part in marker.args)
            if os.environ.get("TRITON_INTERPRET") and not kept:
                item.add_marker("thorough")

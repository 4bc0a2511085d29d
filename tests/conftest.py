"""What must be set before any test module is imported."""

from __future__ import annotations

import os
from typing import Any

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


if os.environ.get("TRITON_INTERPRET"):
    patch_once()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``-m gpu`` selects what is marked so, and every test that has a backend for GPUs as a parameter."""
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(isinstance(value, str) and value.startswith(GPU_BACKENDS) for value in parameters):
            item.add_marker("gpu")

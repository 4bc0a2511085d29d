"""Ranges around ops and phases of the loop; free unless ``APV_FAST_NVTX`` is set.

``APV_FAST_NVTX=1``: NVTX ranges, for Nsight Systems, in the domain "apv_fast" of the ``nvtx`` package; where that is
not installed, torch's own ranges are used, which have no domain. ``APV_FAST_NVTX=torch``: ranges that
``torch.profiler`` shows, on any machine; ``python -m bench`` uses them for its plot of an update. The variable is read
when this module is imported. Off, :func:`annotate` returns one shared object that does nothing, and :func:`annotated`
the function itself: a range costs a quarter of a microsecond on the development machine (``python -m timeit -s "from
apv_fast.profile import annotate" "with annotate('a'): pass"``).

Limits: a range marks what the host does. The replay of a CUDA graph is one call, so the phases inside an update show
only with ``--graph off``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

ENVIRONMENT_VARIABLE = "APV_FAST_NVTX"
TORCH = os.environ.get(ENVIRONMENT_VARIABLE) == "torch"
ENABLED = TORCH or os.environ.get(ENVIRONMENT_VARIABLE) == "1"
DOMAIN = "apv_fast"


_NOTHING = contextlib.nullcontext()  # torch.compile knows this one, so it breaks no graph


def annotate(name: str) -> AbstractContextManager[Any]:
    """A range: ``with annotate("backward"): ...``."""
    return _range(name) if ENABLED else _NOTHING


def annotated(name: str) -> Callable[[Function], Function]:
    """A range around every call of the decorated function; off, the function itself."""
    return _range(name) if ENABLED else lambda function: function


def _range(name: str) -> Any:
    if TORCH:
        return torch.profiler.record_function(name)
    try:
        import nvtx
    except ImportError:
        if not torch.cuda.is_available():
            raise ImportError(
                f"{ENVIRONMENT_VARIABLE} is 1, but the nvtx package is not installed and torch sees no CUDA device; "
                "pip install nvtx, or unset the variable"
            ) from None
        return torch.cuda.nvtx.range(name)
    return nvtx.annotate(message=name, domain=DOMAIN)

"""NVTX ranges around ops and phases of the loop, for Nsight Systems; free unless ``APV_FAST_NVTX=1``.

The variable is read when this module is imported. Ranges are in the domain "apv_fast" of the ``nvtx`` package; where
that is not installed, torch's own ranges are used, which have no domain. Off, :func:`annotate` returns one shared
object that does nothing, and ops are registered as they are.

Limits: a range marks what the host does. The replay of a CUDA graph is one call, so the phases inside an update show
only with ``--graph off``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

ENVIRONMENT_VARIABLE = "APV_FAST_NVTX"
ENABLED = os.environ.get(ENVIRONMENT_VARIABLE) == "1"
DOMAIN = "apv_fast"


class Range(Protocol):
    """A context manager that also decorates functions."""

    def __enter__(self) -> Any:
        """Begin the range."""
        ...

    def __exit__(self, *exception: Any) -> Any:
        """End it."""
        ...

    def __call__(self, function: Function, /) -> Function:
        """The function with a range around every call."""
        ...


class _Nothing(AbstractContextManager[None]):
    """No range."""

    def __exit__(self, *exception: object) -> None:
        return None

    def __call__(self, function: Function) -> Function:
        return function


_NOTHING = _Nothing()


def annotate(name: str) -> Range:
    """A range ``name``: ``with annotate("backward"): ...``, or ``@annotate("backward")`` above a function."""
    return _range(name) if ENABLED else _NOTHING


def _range(name: str) -> Any:
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

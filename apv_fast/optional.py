"""Packages that only some commands need, imported when they are."""

from __future__ import annotations

import importlib
from types import ModuleType


def optional(module: str, what: str, extra: str) -> ModuleType:
    """Import ``module`` for ``what`` ("HDF5 files need"); ``extra`` of ours installs it.

    Raises:
        ImportError: it cannot be imported; says what to do.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{what} {package}: pip install 'apv-fast[{extra}]' ({error})") from error

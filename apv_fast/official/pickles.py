"""Pickles of NumPy arrays, read without running what else a pickle could hold."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from apv_fast.run import CheckpointError


class _Refused(pickle.UnpicklingError):
    """The file names something that is not part of an array."""


class _ArraysOnly(pickle.Unpickler):
    """Builds tuples, lists and NumPy arrays; whatever else a pickle wants to have called is refused before it is."""

    _ALLOWED = frozenset(
        {("numpy", "ndarray"), ("numpy", "dtype")}
        | {(f"{package}.multiarray", "_reconstruct") for package in ("numpy.core", "numpy._core")}
        | {(f"{package}.numeric", "_frombuffer") for package in ("numpy.core", "numpy._core")}  # protocol 5
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise _Refused(f"{module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_arrays(path: Path) -> list[np.ndarray]:
    """The floating-point arrays of one pickled tuple or list, as float32.

    Raises:
        CheckpointError: it holds something else (it says what), or the file is damaged; nothing in it has been run.
    """
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file).load()
    except _Refused as error:
        raise CheckpointError(
            path, "pickle", f"refused: it holds {error}, which could run code; only NumPy arrays are read"
        ) from error
    except OSError as error:
        raise CheckpointError(path, "file", f"cannot be read ({error.strerror})") from error
    except Exception as error:  # damage shows in the unpickler or in NumPy
        raise CheckpointError(path, "pickle", f"is damaged ({type(error).__name__}: {error})") from error
    if not isinstance(content, list | tuple):
        raise CheckpointError(path, "pickle", f"holds a {type(content).__name__}; it must hold a tuple of NumPy arrays")
    for index, array in enumerate(content):
        if not isinstance(array, np.ndarray):
            raise CheckpointError(path, f"item {index}", f"is a {type(array).__name__}; it must be a NumPy array")
        if not np.issubdtype(array.dtype, np.floating) or not np.isfinite(array).all():
            kind = f"has dtype {array.dtype}" if array.dtype.kind != "f" else "has NaN or infinity"
            raise CheckpointError(path, f"item {index}", f"{kind}; weights are finite floating-point numbers")
    return [array.astype(np.float32, copy=False) for array in content]

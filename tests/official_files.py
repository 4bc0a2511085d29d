"""The official implementation's own files in a folder of golden tensors: a checkpoint's pickles, episodes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from apv_fast.data import read_episode

# A checkpoint file is a tuple of arrays in the order of the layers' names, each layer's kernel, then its bias.
_GRU = ("gru.kernel", "gru.bias", "gru.norm.gamma", "gru.norm.beta")
_RSSM_LAYERS = ("img_dist_0", "img_in", "img_out_0", "obs_dist", "obs_out")
_CONVS = ("conv0", "conv1", "conv2", "conv3")


def _variables(*layers: str) -> tuple[str, ...]:
    return tuple(f"{layer}.{kind}" for layer in layers for kind in ("kernel", "bias"))


CHECKPOINT = {
    "encoder": _variables(*_CONVS),
    "rssm": _GRU + _variables(*_RSSM_LAYERS),
    "decoder": _variables(*_CONVS, "convin"),
}


class _ArraysOnly(pickle.Unpickler):
    """Reads tuples and lists of NumPy arrays; anything else in the file is refused, so it cannot run code."""

    _ALLOWED = frozenset(
        (module, name)
        for package in ("numpy.core", "numpy._core")
        for module, name in ((f"{package}.multiarray", "_reconstruct"), (f"{package}.multiarray", "scalar"))
    ) | {("numpy", "ndarray"), ("numpy", "dtype")}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"holds {module}.{name}; only NumPy arrays are read")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_arrays(file: BinaryIO) -> list[np.ndarray]:
    """The arrays of one pickle.

    Raises:
        pickle.UnpicklingError: it holds something else.
    """
    arrays = _ArraysOnly(file).load()
    if not isinstance(arrays, list | tuple) or not all(isinstance(array, np.ndarray) for array in arrays):
        raise pickle.UnpicklingError("must hold a tuple of NumPy arrays")
    return list(arrays)


def read_checkpoint(folder: Path) -> dict[str, np.ndarray]:
    """The weights of a pre-training checkpoint by the names of the golden files, ``w.<part>.<variable>``.

    Raises:
        ValueError: a file has another number of arrays than such a model has.
    """
    weights: dict[str, np.ndarray] = {}
    for part, names in CHECKPOINT.items():
        with (folder / f"{part}_variables.pkl").open("rb") as file:
            arrays = read_arrays(file)
        if len(arrays) != len(names):
            raise ValueError(f"{file.name} has {len(arrays)} arrays; it must have {len(names)}: {', '.join(names)}")
        weights |= {f"w.{part}.{name}": array for name, array in zip(names, arrays, strict=True)}
    return weights


def compare_episode(path: Path) -> list[tuple[str, str, Any, Any]]:
    """What our reader gives for an official episode against the file's own arrays."""
    with np.load(path, allow_pickle=False) as file:
        official = {name: file[name] for name in file.files}
    episode = read_episode(path)
    return [("value", name, episode[name], official[name]) for name in episode if name in official]

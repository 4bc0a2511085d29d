"""Makes a checkout that is not installed usable: ``apv_fast.kernels`` is the folder ``kernels/`` beside ``apv_fast/``.

An installation maps the one to the other. Where there is none, :func:`arrange` adds an importer that does. It is also a
plugin of pytest (``-p bench.gpu.checkout``), so that tests run from a bare checkout. An installation goes first.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "kernel-cache"  # what Triton and Inductor compiled, unless the environment says otherwise


class _Kernels(importlib.abc.MetaPathFinder):
    """Finds the package of Triton kernels; its modules are then found in its folder."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The package itself, and nothing else."""
        if fullname != "apv_fast.kernels":
            return None
        folder = ROOT / "kernels"
        return importlib.util.spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def arrange() -> None:
    """Make ``apv_fast``, ``bench`` and ``tests`` of this checkout importable."""
    if not any(isinstance(finder, _Kernels) for finder in sys.meta_path):
        sys.meta_path.append(_Kernels())  # last: an installation's finder goes first
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))


def environment(**more: str) -> dict[str, str]:
    """For a process that works in this checkout on a GPU: the interpreter off, CUDA's programs on the path, and caches
    of compiled kernels in the checkout.
    """
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    cuda = Path(env.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    if cuda.is_dir():
        env["PATH"] = f"{env.get('PATH', '')}{os.pathsep}{cuda}"
    caches = {"TRITON_CACHE_DIR": str(CACHE / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor")}
    return caches | env | {"PYTHONUNBUFFERED": "1"} | more


arrange()

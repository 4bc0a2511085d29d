"""How a driver gets at a peer's files: its folder, its YAML, stand-ins for packages that an update does not use."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

from bench.peers.setup import PeerError

_FLOAT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def use(path: Path, *needed: str) -> None:
    """Import from ``path`` first.

    Raises:
        PeerError: one of the ``needed`` files is not in it.
    """
    for name in needed:
        if not (path / name).exists():
            raise PeerError(f"path is {path}: there is no {name}")
    sys.path.insert(0, str(path.resolve()))


def module(name: str) -> Any:
    """Import a module of the peer's.

    Raises:
        PeerError: something that it needs is not here.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PeerError(f"{name} cannot be imported: {error}; what a peer needs goes on PYTHONPATH") from error


def commit(path: Path) -> str:
    """Which commit a checkout is at, "-dirty" behind it if files differ; its folder's name if git cannot say."""
    try:
        command = ["git", "-C", str(path), "describe", "--always", "--dirty"]
        top = ["git", "-C", str(path), "rev-parse", "--show-toplevel"]
        here = subprocess.run(top, capture_output=True, text=True).stdout.strip()
        if here and Path(here) == path.resolve():  # and not a repository around it
            return subprocess.run(command, capture_output=True, text=True).stdout.strip() or path.name
    except OSError:
        pass
    return path.name


def load_yaml(path: Path) -> Any:
    """Parse as YAML 1.2 does: PyYAML reads ``1e-4`` as a string, the peers mean a float."""

    def fix(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: fix(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [fix(inner) for inner in value]
        return float(value) if isinstance(value, str) and _FLOAT.fullmatch(value) else value

    if not path.is_file():
        raise PeerError(f"there is no {path}")
    return fix(module("yaml").safe_load(path.read_text()))


def stand_in(name: str, **attributes: Any) -> None:
    """Put an empty module with these attributes under ``name`` (and under its parents) if it cannot be imported."""
    try:
        importlib.import_module(name)
        return
    except ImportError:
        pass
    parent, _, last = name.rpartition(".")
    if parent:
        stand_in(parent)
    stub: Any = types.ModuleType(name)
    stub.__path__ = []
    vars(stub).update(attributes)
    sys.modules[name] = stub
    if parent:
        setattr(sys.modules[parent], last, stub)

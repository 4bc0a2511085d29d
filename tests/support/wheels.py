"""A made-up wheel."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

INFORMATION = "toy-1.0.dist-info"
TOY = {
    "toy/__init__.py": "VALUE = 3\n",
    "toy/part/tests/test_it.py": "assert False\n",
    "toy/big/data.bin": "x" * 1000,
    f"{INFORMATION}/METADATA": "Name: toy\nVersion: 1.0\n",
    f"{INFORMATION}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
}


def wheel(folder: Path, name: str = "toy-1.0-py3-none-any.whl", files: Mapping[str, str] = TOY) -> Path:
    """Write one into ``folder``."""
    folder.mkdir(exist_ok=True)
    information = "-".join(name.split("-")[:2]) + ".dist-info"
    with zipfile.ZipFile(folder / name, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        archive.writestr(f"{information}/RECORD", "".join(f"{path},,\n" for path in [*files, f"{information}/RECORD"]))
    return folder / name

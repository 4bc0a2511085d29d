"""The caches of compiled kernels as one file, so that a second call, on a bare machine, compiles nothing again.

Children compile into :data:`bench.gpu.checkout.CACHE`. :func:`pack` makes a file of it where the report goes;
:func:`unpack` finds it again as :data:`CARRIED`. Triton and Inductor look entries up by versions, sources and GPU, so a
file of another machine, Python or commit does no harm: nothing is found in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tarfile
from pathlib import Path

from bench.gpu.checkout import CACHE, ROOT

NAME = "kernel-cache.tar.gz"
CARRIED = ROOT / "build" / NAME
LIMIT = 15 * 2**20  # bytes; more may not come back from a machine that is lent
GROUP = "__grp__"  # Triton's: names of the files of one kernel, with their folder


def pack(target: Path) -> str:
    """Write the cache to ``target``, Triton's part alone if all is too large; what is in it, in words."""
    for parts in (("triton", "inductor"), ("triton",)):
        there = [part for part in parts if (CACHE / part).is_dir()]
        if not there:
            return "nothing was compiled"
        part = target.with_name(target.name + ".part")
        with tarfile.open(part, "w:gz", compresslevel=6) as tar:
            count = sum(_add(tar, CACHE / name) for name in there)
        if part.stat().st_size <= LIMIT or parts == ("triton",):
            os.replace(part, target)
            return f"{count} files of {' and '.join(there)}, {target.stat().st_size / 1e6:.1f} MB"
    raise AssertionError


def _add(tar: tarfile.TarFile, folder: Path) -> int:
    """All files but those that a process is just writing, and locks."""
    count = 0
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(CACHE)
        if path.is_file() and not any(part.startswith("tmp.") or part == "lock" for part in name.parts):
            with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                tar.add(path, str(name))
                count += 1
    return count


def unpack(source: Path = CARRIED) -> str:
    """Put a cache that was carried here in place; what came of it, in words, "" if there is none."""
    if not source.exists():
        return ""
    try:
        with tarfile.open(source) as tar:
            tar.extractall(CACHE, filter="data")
            count = len(tar.getnames())
    except (OSError, tarfile.TarError, EOFError) as error:
        shutil.rmtree(CACHE, ignore_errors=True)
        return f"{source.name} cannot be read: {type(error).__name__}: {error}"
    for group in CACHE.rglob(f"{GROUP}*.json"):
        _move(group)
    return f"{count} files of {source.name}"


def _move(group: Path) -> None:
    """Let one of Triton's lists name files beside it: it was written in another folder."""
    content = json.loads(group.read_text())
    paths = {name: str(group.parent / Path(path).name) for name, path in content["child_paths"].items()}
    group.write_text(json.dumps({"child_paths": paths}))

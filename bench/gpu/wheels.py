"""``python -m bench.gpu.wheels``: wheels with which a bare machine with a GPU runs ``apv-fast finetune`` on Meta-world.

That machine has Python 3.12 on x86-64 Linux, PyTorch, Triton, NumPy, rich and Pillow, an EGL of its driver, and no
network. What else the command imports is downloaded here with pip, for that Python and in the versions of
``constraints.txt``, and trimmed: tests, documents, and parts that are never imported; of Meta-world's pictures and
meshes, those of other tasks. A trimmed wheel has a build tag that says so. dm_control and PyAV are not needed for
Meta-world and left out; so is whatever ``--there`` names.

On the machine ``pip install --no-index --no-deps --target DIR wheels/*.whl`` and ``PYTHONPATH=DIR``, or
:func:`unpack`, which needs no pip. NumPy there may be newer than the package allows: that bound is dm_control's.

Limits: needs the network; other suites need other wheels; ``--tasks`` are all that the wheel of Meta-world can make.
"""

from __future__ import annotations

import argparse
import base64
import csv
import fnmatch
import hashlib
import io
import posixpath
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from bench.gpu.checkout import ROOT

FOLDER = ROOT / "wheels"
LIMIT_MIB = 64.0  # that travel to such a machine
PYTHON = "3.12"
TAG = "1trimmed"  # build tag of a wheel that something was taken from
PLATFORMS = ["manylinux2014_x86_64", *(f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 26, 27, 28, 31, 34))]
TASKS = ("lever-pull", "drawer-open", "door-lock", "button-press-topdown-wall", "reach", "dial-turn")  # the paper's
ANYWHERE = "*/tests/* *.pyi *.pxd *.h *.hpp"

# What to download -> what of it is never imported or read. A pattern's * matches slashes too.
WHEELS: dict[str, str] = {
    "mujoco": "mujoco/plugin/* mujoco/mjx/* mujoco/usd/* mujoco/testdata/* mujoco/bin/*",
    "metaworld": "",
    "gymnasium": "gymnasium/envs/*/assets/* gymnasium/envs/box2d/* gymnasium/envs/toy_text/*",
    "farama-notifications": "",
    "cloudpickle": "",
    "scipy": "scipy/cluster/* scipy/datasets/* scipy/differentiate/* scipy/fftpack/* scipy/integrate/* "
    "scipy/interpolate/* scipy/io/* scipy/misc/* scipy/ndimage/* scipy/odr/* scipy/signal/* scipy/stats/*",
    "imageio": "",
    "glfw": "glfw/wayland/*",
    "pyopengl": "OpenGL/DLLS/* OpenGL/GLE/* OpenGL/Tk/* OpenGL/WGL/* OpenGL/GLUT/*",
    "absl-py": "",
    "tyro": "",
    "docstring-parser": "",
    "typeguard": "",
    "typing-extensions": "",
    "pydantic": "pydantic/v1/*",
    "pydantic-core": "",
    "annotated-types": "",
    "typing-inspection": "",
    "tensorboard": "tensorboard/webfiles.zip",
    "protobuf": "",
    "matplotlib": "matplotlib/mpl-data/sample_data/* matplotlib/mpl-data/images/* matplotlib/backends/web_backend/*",
    "fonttools": "fontTools/[a-ln-z]*/* fontTools/m[et]*/* *.data/*",  # Matplotlib imports its list of names of glyphs
    "contourpy": "",
    "kiwisolver": "",
    "cycler": "",
    "pyparsing": "",
    "python-dateutil": "",
    "packaging": "",
}
Keep = Callable[[str], bool]


def download(names: Iterable[str], folder: Path, python: str = PYTHON) -> None:
    """The wheels of ``names``, without what they depend on.

    Raises:
        subprocess.CalledProcessError: pip found none; it has said why.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest"]
    command += [str(folder), "--constraint", str(ROOT / "constraints.txt"), "--implementation", "cp"]
    command += ["--python-version", python, *(f"--platform={name}" for name in PLATFORMS), *names]
    subprocess.run(command, check=True)


def normal(name: str) -> str:
    """A package's name as it is compared: ``PyOpenGL`` is ``pyopengl``."""
    return re.sub(r"[-_.]+", "-", name).lower()


def trim(wheel: Path, out: Path, keep: Keep) -> Path:
    """Copy ``wheel`` to the folder ``out`` without the files that ``keep`` refuses.

    Returns:
        The new file, under the old name if nothing was refused, else with a build tag.

    Raises:
        ValueError: its name or content is not that of a wheel.
    """
    parts = wheel.stem.split("-")
    if wheel.suffix != ".whl" or len(parts) != 5:
        raise ValueError(f"{wheel.name} is not NAME-VERSION-PYTHON-ABI-PLATFORM.whl")
    record = f"{parts[0]}-{parts[1]}.dist-info/RECORD"
    with zipfile.ZipFile(wheel) as source:
        names = [info.filename for info in source.infolist() if not info.is_dir()]
        if record not in names:
            raise ValueError(f"{wheel.name} has no {record}")
        information = record.removesuffix("RECORD")
        kept = [name for name in names if name != record and (name.startswith(information) or keep(name))]
        if len(kept) + 1 == len(names):
            target = out / wheel.name
            target.write_bytes(wheel.read_bytes())
            return target
        target = out / f"{'-'.join([*parts[:2], TAG, *parts[2:]])}.whl"
        rows = []
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for name in kept:
                content = source.read(name)
                if name == information + "WHEEL":
                    content = content.rstrip() + f"\nBuild: {TAG}\n\n".encode()
                archive.writestr(source.getinfo(name), content, zipfile.ZIP_DEFLATED, 9)
                digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
                rows.append((name, f"sha256={digest}", len(content)))
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([*rows, (record, "", "")])
            archive.writestr(record, text.getvalue())
    return target


def refuse(patterns: Sequence[str]) -> Keep:
    """Keeps what none of the ``patterns`` matches; ``*`` matches slashes too."""
    return lambda name: not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def of_tasks(wheel: Path, tasks: Sequence[str]) -> Keep:
    """Keeps of Meta-world all code and XML, and the textures and meshes that the models of ``tasks`` name.

    Raises:
        ValueError: a task has no file.
    """
    with zipfile.ZipFile(wheel) as source:
        texts = {name: source.read(name).decode() for name in source.namelist() if name.endswith((".xml", ".py"))}
        names = set(source.namelist())
    wanted: set[str] = set()
    waiting: list[str] = []
    for task in tasks:
        code = texts.get(f"metaworld/envs/sawyer_{task.replace('-', '_')}_v3.py")
        if code is None:
            raise ValueError(f"task {task!r}: {wheel.name} has no such environment")
        waiting += [f"metaworld/assets/{path}" for path in re.findall(r'"([\w/.]+\.xml)"', code)]
    while waiting:
        name = waiting.pop()
        if name in wanted:
            continue
        wanted.add(name)
        for path in re.findall(r'file\s*=\s*"([^"]+)"', texts.get(name, "")):
            waiting += _candidates(name, path, names)
    return lambda name: not name.endswith((".png", ".stl", ".obj", ".msh")) or name in wanted


def _candidates(xml: str, path: str, names: set[str]) -> list[str]:
    """The files of a wheel that ``path`` in ``xml`` may mean: MuJoCo starts from the folder of the main model's file,
    or from one that a compiler element names, so every file is taken whose path ends like this one.
    """
    beside = posixpath.normpath(posixpath.join(posixpath.dirname(xml), path))
    end = "/" + re.sub(r"^(\.\.?/)+", "", path)
    return [beside] * (beside in names) + [name for name in names if name.endswith(end)]


def make(folder: Path, names: Sequence[str], tasks: Sequence[str], fetch: Callable[[Iterable[str], Path], None]) -> int:
    """Fill ``folder``, which must not exist or be empty; prints each wheel's size. Returns the bytes of all."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; name another folder, or empty it")
    total = 0
    with tempfile.TemporaryDirectory() as scratch:
        fetch(names, Path(scratch))
        for wheel in sorted(Path(scratch).glob("*.whl")):
            name = normal(wheel.name.partition("-")[0])
            keeps = [refuse(f"{ANYWHERE} {WHEELS.get(name, '')}".split())]
            if name == "metaworld":
                keeps.append(of_tasks(wheel, tasks))
            out = trim(wheel, folder, lambda file, keeps=keeps: all(keep(file) for keep in keeps))  # type: ignore[misc]
            before, after = wheel.stat().st_size, out.stat().st_size
            print(f"{after / 2**20:7.2f} MiB of {before / 2**20:6.2f}  {out.name}")
            total += after
    return total


def unpack(folder: Path, into: Path) -> Path:
    """Unpack every wheel of ``folder`` so that ``into`` can be put on ``sys.path``; again only if they changed.

    Raises:
        ValueError: there is no wheel.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise ValueError(f"{folder} has no wheels; make them with python -m bench.gpu.wheels")
    stamp = "\n".join(f"{wheel.name} {wheel.stat().st_size}" for wheel in wheels)
    mark = into / "unpacked.txt"
    if not mark.exists() or mark.read_text() != stamp:
        into.mkdir(parents=True, exist_ok=True)
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as source:
                for info in source.infolist():
                    top, _, rest = info.filename.partition("/")
                    if top.endswith(".data"):
                        kind, _, info.filename = rest.partition("/")
                        if kind not in ("purelib", "platlib"):
                            continue  # scripts and the like
                    source.extract(info, into)
        mark.write_text(stamp)
    return into


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the folder; 1 if it is larger than the limit."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.wheels", description="Wheels for a bare GPU machine.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to make (default: wheels/)")
    parser.add_argument("--there", default="", metavar="NAMES", help="packages that the machine has, by commas")
    parser.add_argument("--tasks", default=",".join(TASKS), help="of Meta-world (default: the paper's six)")
    parser.add_argument("--limit", type=float, default=LIMIT_MIB, metavar="MIB", help="of all wheels together")
    parser.add_argument("--python", default=PYTHON, help=f"of that machine (default: {PYTHON})")
    options = parser.parse_args(arguments)
    there = {normal(name) for name in options.there.split(",") if name}
    if unknown := there - WHEELS.keys():
        parser.error(f"--there: {', '.join(sorted(unknown))}: must be some of {', '.join(WHEELS)}")
    names = [name for name in WHEELS if name not in there]
    try:
        total = make(options.out, names, options.tasks.split(","), partial(download, python=options.python)) / 2**20
    except ValueError as error:
        parser.error(str(error))
    print(f"{total:7.2f} MiB in {options.out}, of {options.limit:g} that may be carried")
    if total > options.limit:
        print(f"too much by {total - options.limit:.2f} MiB: fewer --tasks, or name in --there what the machine has")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Who imports whom: no arrow runs up, whether a module is imported at the head of a file or inside a function.

A part of the package may import the parts named beside it in ``MAY_IMPORT``, which all stand above it there; so there
is no circle either. The table of backends names modules in strings, imports none, and may be imported by all.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"apv_fast": ROOT / "apv_fast", "apv_fast.kernels": ROOT / "kernels"}

_ALL_MAY = {"types", "backend", "profile", "optional", "worker", "atomic_file"}  # these import nothing of ours
_MATH = _ALL_MAY | {"reference", "ops", "recurrence"}
_FILES = _ALL_MAY | {"config"}  # files, processes and settings: nothing of models
MAY_IMPORT: dict[str, set[str]] = {
    **{part: set() for part in sorted(_ALL_MAY)},
    "_C": set(),  # the extension
    "reference": _ALL_MAY,
    "ops": _ALL_MAY | {"reference"},
    "recurrence": _ALL_MAY | {"reference", "ops"},
    "cpu": _MATH | {"_C"},
    "cuda": _MATH,
    "kernels": _MATH,
    "mixed_precision": _ALL_MAY,
    "nn": _MATH - {"recurrence"} | {"mixed_precision"},
    "optim": _MATH - {"recurrence"} | {"mixed_precision"},
    "config": _ALL_MAY,
    "envs": _ALL_MAY,
    "data": _ALL_MAY,
    "run": _ALL_MAY,
    "official": _FILES | {"run"},
    "experiments": _FILES | {"envs", "run"},
    "agent": _FILES | {"ops", "nn", "optim", "mixed_precision", "envs", "data", "run"},
    "apv_fast": {"ops", "nn", "backend"},  # apv_fast/__init__.py
    "commands": _FILES
    | {"ops", "nn", "optim", "cpu", "envs", "data", "run", "official", "experiments", "agent", "apv_fast"},
    "cli": _FILES | {"data", "run", "experiments"},
}

# Arrows that run up, as (part, what it imports): to be taken out one by one, and none to be added.
UPWARD: set[tuple[str, str]] = {
    ("cpu", "apv_fast.nn"),  # acting is no function of tensors: it watches the modules' weights
}


def part_of(module: str) -> str:
    """The part of the package that a module belongs to: "data" for ``apv_fast.data.store``."""
    _, _, rest = module.partition(".")
    part = rest.partition(".")[0] or "apv_fast"
    return part


def modules(packages: dict[str, Path]) -> dict[str, Path]:
    """Every module of the packages by name, and its file."""
    files = {}
    for package, folder in packages.items():
        for path in folder.rglob("*.py"):
            words = path.relative_to(folder).with_suffix("").parts
            files[".".join([package, *(word for word in words if word != "__init__")])] = path
    return files


def imported(name: str, path: Path, known: set[str]) -> Iterator[str]:
    """The modules of ours that the file of module ``name`` imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(), path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # from . import x
                above = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                base = ".".join([*above[: len(above) - node.level + 1], *filter(None, [base])])
            # What is imported may be a module itself, or a name in one.
            names = [inner if (inner := f"{base}.{alias.name}") in known else base for alias in node.names]
        else:
            continue
        yield from (one for one in names if one.partition(".")[0] == "apv_fast")


def arrows(packages: dict[str, Path]) -> dict[tuple[str, str], set[str]]:
    """Every (part, module of another part that it imports), and the modules that do."""
    files = modules(packages)
    known = {*files, "apv_fast._C"}
    importers: dict[tuple[str, str], set[str]] = {}
    for name, path in files.items():
        for target in imported(name, path, known):
            if part_of(target) != part_of(name):
                importers.setdefault((part_of(name), target), set()).add(name)
    return importers


def upward(packages: dict[str, Path]) -> dict[tuple[str, str], set[str]]:
    """The arrows that run up."""
    return {
        (part, target): names
        for (part, target), names in arrows(packages).items()
        if part_of(target) not in MAY_IMPORT[part]
    }


def bound(path: Path) -> set[str]:
    """The names that a file binds, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), path)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return names


def missing(packages: dict[str, Path], users: list[Path]) -> list[str]:
    """What ``users`` import out of the packages and is not there; mypy does not look into the kernels."""
    files = modules(packages)
    names = {name: bound(path) for name, path in files.items()}
    problems = []
    for path in users:
        for node in ast.walk(ast.parse(path.read_text(), path)):
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("apv_fast"):
                there = names.get(node.module or "", set()) | {"_C", "kernels"}
                wrong = [a.name for a in node.names if a.name not in there and f"{node.module}.{a.name}" not in files]
                problems += [f"{path}: from {node.module} import {name}" for name in wrong]
    return problems


def test_what_is_imported_is_there() -> None:
    users = [path for folder in ("apv_fast", "kernels", "bench", "tests") for path in (ROOT / folder).rglob("*.py")]
    assert missing(PACKAGES, users) == []


def test_an_import_of_nothing_is_seen(tmp_path: Path) -> None:
    texts = {"nn": "def f(): ...", "a": "from apv_fast.nn import f", "b": "from apv_fast.nn import g"}
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert missing({"apv_fast": tmp_path}, sorted(tmp_path.glob("[ab].py"))) == [
        f"{tmp_path / 'b.py'}: from apv_fast.nn import g"
    ]


def test_every_part_has_its_place() -> None:
    assert {part_of(name) for name in modules(PACKAGES)} | {"_C"} == set(MAY_IMPORT)
    above: set[str] = set()
    for part, allowed in MAY_IMPORT.items():
        assert allowed <= above, f"{part} may import {', '.join(sorted(allowed - above))}, which stand below it"
        above.add(part)


def test_no_arrow_runs_up() -> None:
    importers = upward(PACKAGES)
    new = [
        f"{name} imports {target}" for (part, target) in importers.keys() - UPWARD for name in importers[part, target]
    ]
    assert not new, f"{'; '.join(sorted(new))}; {__name__} says who may import whom"


def test_arrows_that_are_gone_are_off_the_list() -> None:
    assert upward(PACKAGES).keys() >= UPWARD


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("data/replay.py", "from apv_fast.agent import Agent"),
        ("envs/parallel.py", "import apv_fast.agent.agent as it"),
        ("run/gif.py", "def f():\n    from apv_fast import agent, profile"),
        ("reference/rssm.py", "from ..nn import RSSM"),
        ("ops/__init__.py", "from ..cpu.knn_bonus import knn_bonus"),
        ("agent/agent.py", "from apv_fast.commands.parts.training_run import begin"),
        ("types.py", "from . import backend"),
    ],
)
def test_an_upward_arrow_is_seen(tmp_path: Path, module: str, line: str) -> None:
    names = ["agent/__init__", "agent/agent", "nn/__init__", "cpu/__init__", "cpu/knn_bonus", "backend", "profile"]
    for path in (tmp_path / f"{name}.py" for name in (*names, "commands/parts/training_run")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / module).parent.mkdir(exist_ok=True)
    (tmp_path / module).write_text(f"from __future__ import annotations\n{line}\n")
    ((part, _),) = upward({"apv_fast": tmp_path})
    assert part == part_of(f"apv_fast.{module.removesuffix('.py').replace('/', '.')}")

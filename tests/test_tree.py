"""The tree keeps its rules: an op has one name in every room, tests stand alone, files are short."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from apv_fast.backend import IMPLEMENTATIONS
from tests.support import ROOT

TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
# op -> the module that it shares with another; all others have one of their own name.
SHARED = {
    "image_encoder": "image_model",
    "image_decoder": "image_model",
    "normalize_image": "image_loss",
    "kl_balance_normal": "kl_balance",
}
PUBLIC = {"keras_adam": "apv_fast/optim.py", "policy": "apv_fast/agent/policy.py"}  # classes, no functions of tensors
MODULES = sorted({SHARED.get(op, op) for op in IMPLEMENTATIONS})
LIMIT = 400  # lines of a file


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> set[str]:
    """Everything that a module imports, also within functions, as dotted names."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("module", MODULES)
def test_an_op_has_tests_of_its_name(module: str) -> None:
    path = ROOT / "tests" / "ops" / f"test_{module}.py"
    tree = ast.parse(path.read_text())
    assert any(
        node.name.lower().startswith("test") for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)
    )


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_an_op_has_one_name_in_every_room(op: str) -> None:
    """``apv_fast/ops/<op>.py``, a module of that name on every backend that has the op, and ``bench/cases/<op>.py``."""
    module = SHARED.get(op, op)
    cells = {backend: cell.partition(":")[0] for backend, cell in IMPLEMENTATIONS[op].items()}
    assert {backend: cell.rpartition(".")[2] for backend, cell in cells.items()} == dict.fromkeys(cells, module)
    for path in (PUBLIC.get(op, f"apv_fast/ops/{module}.py"), f"bench/cases/{module}.py"):
        assert (ROOT / path).is_file(), path


def test_no_test_module_imports_from_another() -> None:
    modules = {name_of(path).removesuffix(".py").replace("/", ".") for path in TESTS}
    cross_imports = {name_of(path): sorted(imports(path) & modules) for path in (ROOT / "tests").rglob("*.py")}
    assert {path: names for path, names in cross_imports.items() if names} == {}


@pytest.mark.parametrize("folder", ["apv_fast", "bench", "kernels", "tests"])
def test_files_are_short(folder: str) -> None:
    lines = {name_of(path): path.read_text().count("\n") for path in (ROOT / folder).rglob("*.py")}
    assert lines, folder
    assert {path: count for path, count in lines.items() if count > LIMIT} == {}

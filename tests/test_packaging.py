"""Every way to install the package, each in an environment of its own. Slow: `make package-test`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NO_COMPILER = {"CXX": "/no/compiler", "CC": "/no/compiler"}  # CMake also looks where PATH does not point
REPORT = "import apv_fast, apv_fast.kernels; print(apv_fast.__file__); print(apv_fast.backends()['cpu'])"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a checkout to build from"),
]


class Environment:
    """A new virtual environment with nothing but pip in it, and a folder outside of the checkout to run in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)

    def run(
        self, *arguments: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None, fails: bool = False
    ) -> str:
        """Run Python; everything it printed. ``fails``: it must exit non-zero instead of zero."""
        result = subprocess.run(
            [self.folder / "venv/bin/python", *arguments],
            cwd=cwd or self.folder,
            env={**os.environ, "PYTHONPATH": "", **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert (result.returncode != 0) == fails, result.stdout
        return result.stdout

    def install(self, *what: str | Path, env: Mapping[str, str] | None = None, fails: bool = False) -> str:
        """Run ``pip install`` with the tested versions."""
        constraints = ROOT / "constraints.txt"
        return self.run("-m", "pip", "install", "-v", "-c", constraints, *what, env=env, fails=fails)


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[Environment]:
    yield Environment(tmp_path)
    shutil.rmtree(tmp_path / "venv")  # over a gigabyte with torch


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unpacked sdist, so that nothing which only a checkout has can help."""
    folder = tmp_path_factory.mktemp("source")
    subprocess.run([sys.executable, "-m", "build", "--sdist", "-o", folder, ROOT], check=True)
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder)
    (unpacked,) = (path for path in folder.iterdir() if path.is_dir())
    return unpacked


def test_wheel_from_sdist_without_compiler(environment: Environment, source: Path) -> None:
    pip: list[str | Path] = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", environment.folder, source]
    subprocess.run(pip, check=True, env={**os.environ, "APV_FAST_REQUIRE_EXT": "1"})
    (wheel,) = environment.folder.glob("*.whl")
    hidden = {**NO_COMPILER, "PATH": str(environment.folder / "venv/bin")}
    environment.install(f"{wheel}[triton]", "pytest", "hypothesis", env=hidden)
    printed = environment.run("-c", REPORT, env=hidden)
    assert str(environment.folder) in printed
    assert "cpu: on cpu (" in printed
    shutil.copytree(source / "tests", environment.folder / "tests")
    shutil.copy(source / "pyproject.toml", environment.folder)
    # The tests of what the wheel holds in compiled form; the whole suite would take minutes more.
    environment.run("-m", "pytest", "-q", "tests/ops/test_knn_bonus.py", "tests/ops/test_lambda_return.py", env=hidden)


def test_install_from_source(environment: Environment, source: Path) -> None:
    environment.install(source, env={"APV_FAST_REQUIRE_EXT": "1"})
    printed = environment.run("-c", REPORT)
    assert str(environment.folder) in printed
    assert "cpu: on cpu (" in printed


def test_editable(environment: Environment, source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "editable"
    shutil.copytree(source, copy)
    environment.install("-e", copy, env={"APV_FAST_REQUIRE_EXT": "1"})
    for folder in (environment.folder, copy):  # in the checkout its packages can be imported directly as well
        printed = environment.run("-c", REPORT + "; print(apv_fast.kernels.__file__)", cwd=folder)
        assert str(copy / "apv_fast/__init__.py") in printed
        assert str(copy / "kernels/__init__.py") in printed
        assert "cpu: on cpu (" in printed
    # The folder's own name must not make a second copy of its modules.
    assert "import apv_fast.kernels" in environment.run("-c", "import kernels", cwd=copy, fails=True)


def test_install_without_compiler(environment: Environment, source: Path) -> None:
    printed = environment.install(source, env={**NO_COMPILER, "APV_FAST_REQUIRE_EXT": "1"}, fails=True)
    assert "CMAKE_CXX_COMPILER" in printed
    printed = environment.install(source, env=NO_COMPILER)
    assert printed.count("WITHOUT its C++ extension") == 1
    reason = "cpu: not available: the C++ extension is not built"
    assert reason in environment.run("-c", REPORT)
    use = "import torch; from apv_fast.ops import knn_bonus; x = torch.eye(3); print(knn_bonus(x, x, k=2))"
    printed = environment.run("-c", f"{use}; knn_bonus(x, x)")
    assert "0.7071" in printed
    assert printed.count("runs on the reference") == 1
    assert printed.count("build-essential python3-dev") == 1

"""Builds csrc/ into apv_fast._C, and with nvcc into apv_fast/_cuda.so, with CMake; kernels/ becomes apv_fast.kernels.

All else: pyproject.toml. ``APV_FAST_CUDA=0`` in the environment leaves the CUDA kernels out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
REQUIRE_EXTENSION = os.environ.get("APV_FAST_REQUIRE_EXT") == "1"

NOT_BUILT = """({error})
apv-fast is being installed WITHOUT its C++ extension: ops on the CPU will run on the reference (plain PyTorch).
For the fast ones, install a C++17 compiler and Python's headers (Debian: build-essential python3-dev), then install
apv-fast again. APV_FAST_REQUIRE_EXT=1 makes this an error."""


class CMakeBuild(build_ext):
    """Runs CMake for the extension. Without a compiler the package is installed all the same."""

    def build_extension(self, ext: Extension) -> None:
        """Configure, compile and copy the module to where setuptools expects it.

        Raises:
            CompileError: CMake or the compiler failed; setuptools prints it and goes on if the extension is optional.
        """
        import pybind11

        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        for built in (module, module.parent / "_cuda.so"):
            built.unlink(missing_ok=True)  # never package one that an earlier build left behind
        build = Path(self.build_temp).resolve() / ext.name
        configure = [
            # --fresh: the cache of an earlier build names tools in an isolated environment that is gone.
            *("cmake", "--fresh", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            *("-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_INSTALL_PREFIX={module.parent}"),
            *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
            f"-DAPV_FAST_CUDA={os.environ.get('APV_FAST_CUDA') or 'ON'}",
        ]
        try:
            for command in (configure, ["cmake", "--build", str(build)], ["cmake", "--install", str(build)]):
                subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(NOT_BUILT.format(error=error)) from error

    def copy_extensions_to_source(self) -> None:
        """Editable installations use the source folder: the CUDA library goes there too, which setuptools knows not."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            built = Path(self.build_lib, *ext.name.split(".")[:-1], "_cuda.so").resolve()
            target = ROOT.joinpath(*ext.name.split(".")[:-1], "_cuda.so")
            if built != target:
                target.unlink(missing_ok=True)
                if built.exists():
                    shutil.copy2(built, target)


setup(
    packages=[
        *find_packages(include=["apv_fast", "apv_fast.*"]),
        "apv_fast.kernels",
        *(f"apv_fast.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"apv_fast.kernels": "kernels"},
    ext_modules=[Extension("apv_fast._C", sources=[], optional=not REQUIRE_EXTENSION)],
    cmdclass={"build_ext": CMakeBuild},
)

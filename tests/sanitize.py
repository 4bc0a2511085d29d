"""Run the CPU ops' tests in AddressSanitizer and UBSan: ``make sanitize``, or ``python -m tests.sanitize [PYTEST'S]``.

Builds ``apv_fast._C`` with ``-DAPV_FAST_SANITIZE=ON`` in ``build/sanitize`` and runs pytest with the sanitizers'
libraries preloaded (Python itself is not built with them) and this file as a plugin, which puts that module in the
place of the installed one. The first finding ends the process with the sanitizer's report.

malloc fills memory with bytes 0xff, which are NaN in every floating format here: what reads memory that nobody has
written, padding for instance, shows in the results, which the tests compare.

Limits: GCC or Clang on Linux; processes that tests start run without; only the module is instrumented, not torch.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
MODULE_VARIABLE = "APV_FAST_SANITIZED_MODULE"  # tells the plugin where the module is
ENVIRONMENT = {
    # Python and torch keep memory to the end of the process on purpose, so no leak detection.
    "ASAN_OPTIONS": f"detect_leaks=0:max_malloc_fill_size={2**40}:malloc_fill_byte=255",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
}
# What runs C++ code on the CPU, at sizes that its tests chose small: their names, their files' or their backend's.
SELECTED = "(cpu or native) and not cuda and not triton and not peak_memory"


def build() -> Path:
    """The sanitized module, brought up to date."""
    import pybind11

    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(BUILD), "-DAPV_FAST_SANITIZE=ON", "-DAPV_FAST_CUDA=OFF"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
    ]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", str(BUILD), "--parallel", str(os.cpu_count() or 1)], check=True)
    (module,) = BUILD.glob("_C.*.so")
    return module


def libraries() -> str:
    """What must be loaded before Python: the sanitizers, and the C++ library whose exceptions they follow."""
    compiler = os.environ.get("CXX", "c++")
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    paths = [subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip() for name in names]
    return " ".join(path for path in paths if Path(path).is_absolute())


def main(arguments: list[str]) -> int:
    """Build, and run pytest with the given arguments or on what :data:`SELECTED` says; its exit status."""
    environment = os.environ | ENVIRONMENT | {MODULE_VARIABLE: str(build()), "LD_PRELOAD": libraries()}
    arguments = arguments or ["tests", "-k", SELECTED]
    # capture=sys: with pytest's own file in place of standard error, the report would end with the process.
    options = ["-p", "tests.sanitize", "-p", "no:cacheprovider", "--capture=sys"]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def use_sanitized(path: str) -> None:
    """Let ``apv_fast._C`` be the module at ``path``."""
    import torch  # noqa: F401 - its copy of OpenMP first, see apv_fast/cpu/__init__.py

    name = "apv_fast._C"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
if MODULE_VARIABLE in os.environ:
    use_sanitized(os.environ[MODULE_VARIABLE])
    os.environ.pop("LD_PRELOAD", None)  # not for the processes that tests start

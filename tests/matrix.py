"""The CPU's tests under other instruction sets and with other random numbers: ``python -m tests.matrix``.

    python -m tests.matrix                     every cell, then a variation: part of `make test-all`
    python -m tests.matrix --variations 20     the same with twenty
    python -m tests.matrix --list              what it would run

A cell is an instruction set for PyTorch's libraries (its own kernels, oneDNN, MKL) and one for ours. PyTorch and oneDNN
obey everywhere, MKL on CPUs of Intel only. A variation has other random numbers in all tests whose bound is
statistical (the marker of that name), and other examples of hypothesis. Arguments behind ``--`` go to pytest.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from apv_fast import _C
from apv_fast.cpu import ISA_VARIABLE

ROOT = Path(__file__).resolve().parents[1]
FILES = ("cpu/test_*.py", "ops/test_*.py", "recurrence/test_*.py")
NOT = ("cpu/test_native.py", "ops/test_rssm_arguments.py")  # no numbers
# Their names for what our kernels call by the first; amx is only theirs.
PYTORCH = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "avx512bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "amx": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"},
}  # fmt: skip
STATISTICAL = "statistical and not thorough and not slow"


@dataclass(frozen=True)
class Cell:
    """One run of the tests."""

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()


def cells() -> list[Cell]:
    """Older CPUs: the same on both sides. And the portable code beside the best of PyTorch's."""
    ours = _C.supported_isas()
    theirs = [name for name in PYTORCH if name in ours or (name == "amx" and _C.has_amx())]
    pairs = [(name, name) for name in theirs[:-1] if name in ours]
    if theirs and len(ours) > 1:
        pairs.append((theirs[-1], ours[-1]))
    chosen = "not triton and not cuda"
    return [
        Cell(f"PyTorch {name}, ours {isa}", PYTORCH[name] | {ISA_VARIABLE: isa}, ("-k", chosen)) for name, isa in pairs
    ]


def variations(count: int) -> list[Cell]:
    """All statistical bounds on every backend, with other numbers."""
    return [
        Cell(f"variation {i}", {"APV_FAST_TEST_VARIATION": str(i)}, ("-m", STATISTICAL, f"--hypothesis-seed={i}"))
        for i in range(1, count + 1)
    ]


def run(cell: Cell, rest: list[str]) -> int:
    """Pytest's exit status."""
    tests = ROOT / "tests"
    files = [
        str(path) for pattern in FILES for path in sorted(tests.glob(pattern)) if path not in map(tests.joinpath, NOT)
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-r", "f", *files, *cell.options, *rest]
    return subprocess.run(command, cwd=ROOT, env=os.environ | cell.environment).returncode


def main(arguments: list[str] | None = None) -> int:
    """Run everything; 1 if a cell failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description="Other instruction sets and numbers.")
    parser.add_argument("--variations", type=int, default=1, help="how many (default: 1)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cells whose name contains this")
    parser.add_argument("--list", action="store_true", help="print the cells and stop")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, behind --")
    options = parser.parse_args(arguments)
    chosen = [cell for cell in [*cells(), *variations(options.variations)] if options.only in cell.name]
    if not chosen:
        parser.error(f"--only: no cell's name contains {options.only!r}; see --list")
    results: dict[str, int] = {}
    for number, cell in enumerate(chosen, 1):
        if options.list:
            print(cell.name, *(f"{name}={value}" for name, value in cell.environment.items()))
            continue
        print(f"\n[{number}/{len(chosen)}] {cell.name}", flush=True)
        start = time.monotonic()
        results[cell.name] = run(cell, options.pytest)
        print(
            f"[{number}/{len(chosen)}] exit status {results[cell.name]}, {time.monotonic() - start:.0f} s", flush=True
        )
    failed = [name for name, status in results.items() if status]
    if results:
        print(f"\n{len(results) - len(failed)} of {len(results)} cells passed", *failed, sep="\nfailed: ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

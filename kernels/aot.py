"""Compile every Triton kernel ahead of time, for a GPU that need not be here, and report what it costs.

    python -m apv_fast.kernels.aot --arch 80 --arch 90

prints registers, spills, shared memory and compile time of each kernel at production sizes, and exits with 1 if one
spills. CI runs it; a new kernel adds its rows to :func:`apv_fast.kernels.aot_table.table`.

Limits: it shows that the compiler accepts a kernel and what the kernel occupies, not that it is right or fast. Must run
in a process without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import interpreting
from .aot_table import CHIPS, Kernel, table


@dataclass(frozen=True)
class Report:
    """What the compiler made of one kernel for one architecture."""

    name: str
    arch: int
    registers: int  # a thread
    spill_stores: int  # bytes a thread
    spill_loads: int  # bytes a thread
    shared: int  # bytes a program
    seconds: float
    ptx: str = field(repr=False)


def compile_kernel(kernel: Kernel, arch: int) -> Report:
    """Compile one row of :func:`table` for compute capability ``arch`` (80, 90, ...).

    Raises:
        RuntimeError: this process interprets kernels, so it cannot compile them.
    """
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET is set, so kernels are interpreted and cannot be compiled: unset it")
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, function = kernel.target.partition(":")
    fn = getattr(importlib.import_module(module), function)
    dtypes = {"fp64": tl.float64, "fp32": tl.float32, "bf16": tl.bfloat16}
    constants = {name: dtypes.get(value, value) for name, value in kernel.constants.items()}
    signature, absent, aligned = _signature(kernel, fn.arg_names)
    divisible: list[list[str | int]] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=fn, signature=signature, constexprs=constants | absent, attrs=dict.fromkeys(aligned, divisible)
    )
    start = time.perf_counter()
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(kernel.options))
    seconds = time.perf_counter() - start
    ptx = compiled.asm["ptx"]
    return Report(kernel.name, arch, *_assemble(ptx), compiled.metadata.shared, seconds, ptx)


def _signature(kernel: Kernel, names: list[str]) -> tuple[dict[str, Any], dict[Any, None], list[tuple[int, ...]]]:
    """The types of a kernel's arguments, the places of fields that are None, and the places of aligned arguments."""
    signature: dict[str, Any] = {}
    absent: dict[Any, None] = {}
    aligned: list[tuple[int, ...]] = []
    for i, name in enumerate(names):
        kind = kernel.signature.get(name, "constexpr")
        signature[name] = kind
        if isinstance(kind, tuple):
            signature[name] = type(kind)(*("constexpr" if field is None else field for field in kind))
            absent |= {(i, j): None for j, field in enumerate(kind) if field is None}
        if name in kernel.aligned:
            aligned += [(i, j) for j in range(len(kind)) if kind[j]] if isinstance(kind, tuple) else [(i,)]
    return signature, absent, aligned


def _assemble(ptx: str) -> tuple[int, int, int]:
    """Registers, spill stores and spill loads that ``ptxas -v`` reports for ``ptx``, of all its functions together."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"^\.target sm_((\d+)\w*)", ptx, re.MULTILINE)
    if target is None:
        raise RuntimeError("the compiled PTX names no target architecture")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        ptxas = get_ptxas(int(target[2])).path  # it has two, and which one is for a GPU differs between versions
        command = [ptxas, "-v", f"--gpu-name=sm_{target[1]}", str(path), "-o", f"{path}.cubin"]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = re.search(r"Used (\d+) registers", log)  # of the kernel, what it calls included
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if registers is None or not spills:
        raise RuntimeError(f"ptxas -v printed no register count: {log.strip() or 'nothing'}")
    return int(registers[1]), sum(int(stores) for stores, _ in spills), sum(int(loads) for _, loads in spills)


def main(arguments: list[str] | None = None) -> int:
    """Compile everything, print a line a kernel; 1 if one spills registers."""
    parser = argparse.ArgumentParser(prog="python -m apv_fast.kernels.aot", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--arch", type=int, action="append", choices=CHIPS, help="compute capability; may be repeated (default: all)"
    )
    parser.add_argument("--only", default="", help="only kernels whose name contains this")
    options = parser.parse_args(arguments)
    print(f"{'kernel':36} {'arch':>5} {'registers':>9} {'spills B':>9} {'shared B':>9} {'seconds':>8}")
    spilled = 0
    for arch in options.arch or CHIPS:
        for kernel in (kernel for kernel in table(arch) if options.only in kernel.name):
            report = compile_kernel(kernel, arch)
            spills = report.spill_stores + report.spill_loads
            spilled += spills > 0
            print(
                f"{report.name:36} {'sm_' + str(arch):>5} {report.registers:9} {spills:9} {report.shared:9}"
                f" {report.seconds:8.2f}"
            )
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())

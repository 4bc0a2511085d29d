"""Every Triton kernel compiles for the GPUs it is meant for, without spilling, on a machine that has none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from apv_fast.kernels import aot

pytest.importorskip("triton")
ARCHITECTURES = (80, 90)
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a program may have on an A100 and an H100

# Runs in its own process: in this one, conftest.py may have switched Triton to its interpreter.
COMPILE = """
import json, re, sys
from apv_fast.kernels import aot
for kernel in aot.KERNELS:
    report = aot.compile_kernel(kernel, int(sys.argv[1]))
    accesses = re.findall(r"\\b(ld|st)\\.global", report.ptx)
    row = {key: value for key, value in vars(report).items() if key != "ptx"} | {"accesses": accesses}
    row["wgmma"] = report.ptx.count("wgmma.mma_async")
    row |= {name: report.ptx.count(name) for name in ("mma.sync", "cp.async.cg", "ld.global.nc", "ld.acquire.gpu")}
    print(json.dumps(row))
"""


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def compile_all(arch: int, cache: Path) -> dict[str, dict[str, Any]]:
    """Reports by kernel name, never from an earlier run's cache."""
    env = clean_environment() | {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", COMPILE, str(arch)]
    process = subprocess.run(command, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    rows = [json.loads(line) for line in process.stdout.splitlines()]
    return {row["name"]: row for row in rows}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], dict[str, dict[str, Any]]]]:
    """Reports by kernel name; all architectures at the same time, since one keeps a single core busy for a minute."""
    with ThreadPoolExecutor(len(ARCHITECTURES)) as pool:
        reports = {arch: pool.submit(compile_all, arch, tmp_path_factory.mktemp("cache")) for arch in ARCHITECTURES}
        yield lambda arch: reports[arch].result()


@pytest.mark.thorough
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", [kernel.name for kernel in aot.KERNELS])
def test_no_spills(compiled: Callable[[int], dict[str, dict[str, Any]]], name: str, arch: int) -> None:
    report = compiled(arch)[name]
    assert (report["spill_stores"], report["spill_loads"]) == (0, 0)
    assert 0 < report["registers"] <= 255
    assert report["shared"] <= SHARED[arch]


@pytest.mark.thorough
@pytest.mark.parametrize("name", [kernel.name for kernel in aot.KERNELS if kernel.name.startswith("lambda_return.")])
def test_lambda_return_waits_for_memory_once(compiled: Callable[[int], dict[str, dict[str, Any]]], name: str) -> None:
    """At H = 15 every load is issued before the first store, and none is issued twice."""
    accesses = compiled(90)[name]["accesses"]
    loads = accesses.count("ld")
    assert accesses[:loads] == ["ld"] * loads
    # Forward: r, d, v without its first row, bootstrap. Backward: g, d, v and G without their first rows, bootstrap.
    assert loads == (15 + 15 + 14 + 1 if ".forward." in name else 15 + 15 + 14 + 14 + 1)


IMAGINATION = [
    kernel.name
    for kernel in aot.KERNELS
    if kernel.name.startswith("imagination.") and "dense:" in kernel.target and "one_row" not in kernel.name
]


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in IMAGINATION if name.endswith((".bf16", ".tf32"))])
def test_imagination_uses_hoppers_tensor_cores(compiled: Callable[[int], dict[str, dict[str, Any]]], name: str) -> None:
    """Warpgroup products, which Triton gives up where an operand's layout does not suit them."""
    assert compiled(90)[name]["wgmma"] > 0


@pytest.mark.thorough
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", [kernel.name for kernel in aot.KERNELS if kernel.name.startswith("rssm.")])
def test_rssm_scan_fits_and_uses_tensor_cores(
    compiled: Callable[[int], dict[str, dict[str, Any]]], name: str, arch: int
) -> None:
    """Within an A100's shared memory; nothing that programs exchange is read through the cache for constants."""
    report = compiled(arch)[name]
    assert report["shared"] <= 163 * 1024
    assert report["ld.global.nc"] == 0
    pointwise = name in ("rssm.forward.phase1.bf16", "rssm.forward.phase3.bf16", "rssm.backward.phase4.bf16")
    assert (report["mma.sync"] + report["wgmma"] > 0) == (not pointwise and ".fp32." not in name)
    assert (report["wgmma"] > 0) == (arch == 90 and name.endswith(("bf16.B50", "tf32.B50")))
    assert (report["cp.async.cg"] > 0) == (not pointwise)
    assert report["ld.acquire.gpu"] == (0 if ".phase" in name else 5)  # a barrier after each phase


def test_names_are_unique() -> None:
    names = [kernel.name for kernel in aot.KERNELS]
    assert len(set(names)) == len(names)


def test_command_prints_a_line_a_kernel() -> None:
    command = [sys.executable, "-m", "apv_fast.kernels.aot", "--arch", "90", "--only", "lambda_return.forward.fp32"]
    process = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    header, row = process.stdout.splitlines()
    assert row.split()[:2] == ["lambda_return.forward.fp32", "sm_90"]
    assert len(row.split()) == len(header.replace(" B", "").split())


def test_interpreting_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset it"):
        aot.compile_kernel(aot.KERNELS[0], 90)

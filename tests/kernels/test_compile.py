"""Every Triton kernel compiles for the GPUs it is meant for, without spilling, on a machine that has none."""

from __future__ import annotations

import itertools
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
from apv_fast.kernels.parts.scan_arguments import Device, make_shape

from apv_fast.types import Latent

pytest.importorskip("triton")
# Bytes that a program may have on an A100, an H100, a B200 and an RTX 5090.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
NAMES = [kernel.name for kernel in aot.table(90)]
# What is compiled every time for the newest two as well: every phase of two models, and products of many rows. All
# else for them takes minutes.
SOME = ("rssm.stacked.forward.bf16.B50", "imagination.gru.bf16", "imagination.sample.bf16")
COMPILED = [(name, arch) for arch in SHARED for name in NAMES]

# Runs in its own process: in this one, conftest.py may have switched Triton to its interpreter.
COMPILE = """
import json, re, sys
from apv_fast.kernels import aot
arch, *only = sys.argv[1:]
for kernel in aot.table(int(arch)):
    if only and kernel.name not in only:
        continue
    report = aot.compile_kernel(kernel, int(arch))
    accesses = re.findall(r"\\b(ld|st)\\.global", report.ptx)
    row = {key: value for key, value in vars(report).items() if key != "ptx"} | {"accesses": accesses}
    row["wgmma"] = report.ptx.count("wgmma.mma_async")
    instructions = ("mma.sync", "tcgen05.mma", "cp.async.cg", "ld.global.nc", "ld.acquire.gpu")
    row |= {name: report.ptx.count(name) for name in instructions}
    row["steps"] = re.findall(r"^\\s*(call|bar\\.sync)\\b", report.ptx, re.MULTILINE)
    print(json.dumps(row))
"""


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def compile_all(arch: int, cache: Path, *only: str) -> dict[str, dict[str, Any]]:
    """Reports by kernel name, never from an earlier run's cache."""
    env = clean_environment() | {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", COMPILE, str(arch), *only]
    process = subprocess.run(command, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    rows = [json.loads(line) for line in process.stdout.splitlines()]
    return {row["name"]: row for row in rows}


Compiled = Callable[[int], dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Compiled]:
    """Reports by kernel name; several architectures at the same time, since one keeps a core busy for a minute."""
    wanted: dict[int, set[str]] = {}
    for item in request.session.items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if item.path == request.path and "name" in parameters:
            wanted.setdefault(parameters.get("arch", 90), set()).add(parameters["name"])
    with ThreadPoolExecutor(2) as pool:
        reports = {a: pool.submit(compile_all, a, tmp_path_factory.mktemp("cache"), *wanted[a]) for a in sorted(wanted)}
        yield lambda arch: reports[arch].result()


def rows(*starts: str) -> list[Any]:
    """Names and architectures as parameters, those that take long marked so."""
    slow = pytest.mark.slow
    return [
        pytest.param(name, arch, marks=[slow] if arch >= 100 and name not in SOME else [], id=f"{name}-{arch}")
        for name, arch in COMPILED
        if name.startswith(starts or "")
    ]


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "arch"), rows())
def test_no_spills(compiled: Compiled, name: str, arch: int) -> None:
    report = compiled(arch)[name]
    assert (report["spill_stores"], report["spill_loads"]) == (0, 0)
    assert 0 < report["registers"] <= 255
    assert report["shared"] <= SHARED[arch]


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("lambda_return.")])
def test_lambda_return_waits_for_memory_once(compiled: Compiled, name: str) -> None:
    """At H = 15 every load is issued before the first store, and none is issued twice."""
    accesses = compiled(90)[name]["accesses"]
    loads = accesses.count("ld")
    assert accesses[:loads] == ["ld"] * loads
    # Forward: r, d, v without its first row, bootstrap. Backward: g, d, v and G without their first rows, bootstrap.
    assert loads == (15 + 15 + 14 + 1 if ".forward." in name else 15 + 15 + 14 + 14 + 1)


IMAGINATION = [
    kernel.name
    for kernel in aot.table(90)
    if kernel.name.startswith("imagination.") and "dense:" in kernel.target and "one_row" not in kernel.name
]


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in IMAGINATION if name.endswith((".bf16", ".tf32"))])
def test_imagination_uses_hoppers_tensor_cores(compiled: Compiled, name: str) -> None:
    """Warpgroup products, which Triton gives up where an operand's layout does not suit them."""
    assert compiled(90)[name]["wgmma"] > 0


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "arch"), rows("rssm."))
def test_rssm_scan_fits_and_uses_tensor_cores(compiled: Compiled, name: str, arch: int) -> None:
    """Within an A100's shared memory too; nothing that programs exchange is read through the cache for constants."""
    report = compiled(arch)[name]
    assert report["shared"] <= 163 * 1024
    assert report["ld.global.nc"] == 0
    pointwise = name in ("rssm.forward.phase1.bf16", "rssm.forward.phase3.bf16", "rssm.backward.phase4.bf16")
    assert (report["mma.sync"] + report["wgmma"] > 0) == (not pointwise and ".fp32." not in name)
    assert (report["wgmma"] > 0) == (arch == 90 and name.endswith(("bf16.B50", "tf32.B50")))
    assert (report["cp.async.cg"] > 0) == (not pointwise)
    assert report["ld.acquire.gpu"] == (0 if ".phase" in name else 5)  # a barrier after each phase


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "arch"), rows("rssm.stacked."))
def test_a_barrier_parts_the_phases_of_both_models(compiled: Compiled, name: str, arch: int) -> None:
    """Phases are called, and a program waits for its own threads between any two calls; a round has two of each."""
    steps = compiled(arch)[name]["steps"]
    assert steps.count("call") == 2 * 5
    assert ("call", "call") not in itertools.pairwise(steps)


CHIPS = {  # multiprocessors, shared memory, major compute capability
    **{"A100": (108, 163, 8), "H100": (132, 227, 9), "B200": (148, 227, 10), "RTX 5090": (170, 99, 12)},
    **{"RTX 5080": (84, 99, 12), "RTX 5070": (48, 99, 12), "RTX 5060": (30, 99, 12), "RTX 3060": (28, 99, 8)},
}


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("batch", [1, 16, 32, 50, 70])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_of_the_scan_fit_other_chips(chip: str, batch: int, itemsize: int) -> None:
    """What a product needs of shared memory: its operands in flight, then its slices' sums."""
    programs, kilobytes, major = CHIPS[chip]
    device = Device(programs, kilobytes * 1024, False, major)
    z = make_shape(1024, 1024, Latent(32, 32), batch, itemsize, "seed", "tf32", device)
    widest = max(4 * z.UNITS, z.GROUPS * z.CLASSES, z.BACK)
    many = z.BM >= z.MANY_ROWS
    operands = (z.STAGES - 1) * (4 if many else z.SPLIT) * (z.BM + widest) * z.DEPTH * itemsize
    assert operands <= device.shared
    assert many or z.SPLIT * z.BM * widest * 4 <= device.shared
    assert not many or major < 10 or major == 12  # tensor memory


def test_names_are_unique() -> None:
    for arch in SHARED:
        names = [kernel.name for kernel in aot.table(arch)]
        assert names == NAMES and len(set(names)) == len(names)


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
        aot.compile_kernel(aot.table(90)[0], 90)

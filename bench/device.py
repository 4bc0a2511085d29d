"""``python -m bench.device``: everything that only a GPU can prove, in one command of about seven minutes.

In stages, the most valuable first: whether it works at all (``smoke``), ours and eager PyTorch on every row that a
target speaks of (``core``), what the machine can do (``ceilings``), the rivals (``rivals``), a part of a real run
(``train``), the GPU's selection of the tests (``tests``). ``--sections`` takes some of them. Everything goes to a JSON
file as soon as it is known, so that a run which is killed leaves what it found; a short table comes last.

A bare machine is enough: a checkout, Python with torch, Triton, NumPy, rich and Pillow, for smoke and tests pytest and
hypothesis, a C compiler for Triton's launchers, and nvcc where no ``apv_fast/_cuda.so`` is carried along. Nothing is
installed. ``kernel-cache.tar.gz``, which a run leaves beside its report, spares the next one its compilations as
``build/kernel-cache.tar.gz``.

Every stage has a share of the time. What does not fit is listed as not run; what fails is listed and does not stop the
rest. The exit status is 0 if all that ran went well, 1 if a test failed or something broke. Without a GPU it compiles
the kernels, says that nothing was measured, and prints no figure.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.cost.machine import MACHINES, with_ceilings
from bench.gpu import build, cache, forecast, table
from bench.gpu.checkout import CACHE, ROOT, environment
from bench.gpu.ledger import SECONDS, SECTIONS, Clock, Ledger
from bench.gpu.stages import Stages, say

BUILD_SECONDS = 120.0
COMPILE_SECONDS = 300.0  # for all Triton kernels, without a GPU
NO_GPU = "no GPU: nothing measured"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.device", description="Prove and measure on a GPU.")
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="where the report goes (default: $OUT, else bench/results)")
    add("--sections", default=",".join(SECTIONS), help=f"some of {','.join(SECTIONS)} (default: all)")
    add("--only", default="", metavar="TEXT", help="only contests whose name contains this")
    add("--seconds", type=float, default=SECONDS, help=f"for everything (default: {SECONDS:.0f})")
    add("--sanitize", action="store_true", help="also the tests on small shapes under compute-sanitizer")
    options = parser.parse_args(arguments)
    options.sections = tuple(options.sections.split(","))
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"--sections: {', '.join(sorted(unknown))}: must be some of {', '.join(SECTIONS)}")
    return options


def default_file(gpu: str) -> Path:
    """Where the report goes unless it is told."""
    if out := os.environ.get("OUT"):
        return Path(out, "device.json")
    name = "".join(c if c.isalnum() else "-" for c in gpu.lower()).strip("-")
    return ROOT / "bench" / "results" / f"{datetime.now(UTC):%Y-%m-%d}-{name}.json"


def facts() -> dict[str, Any]:
    """The software that figures are of."""
    versions = [f"Python {platform.python_version()}"]
    for name in ("torch", "triton", "numpy"):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "versions": ", ".join(versions),
        "commit": commit(),
        "CPU": f"{os.cpu_count()} cores, {platform.platform()}",
    }


def commit() -> str:
    """Which commit this is, "-dirty" behind it if files differ; "unknown" where git or its history is not here."""
    try:
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20).stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def make_library(ledger: Ledger, probe: build.Probe, folder: Path) -> None:
    """See :mod:`bench.gpu.build`; a failure costs the CUDA backend's rows and nothing else."""
    say(f"apv_fast/_cuda.so: {'here, and it loads' if probe.library else probe.why}")
    seconds = max(0.0, min(BUILD_SECONDS, ledger.clock.left()))
    ledger.note("build", **build.build(probe, folder / "build.log", seconds))
    if error := ledger.report["build"].get("error"):
        ledger.broke("build", error)


def compile_kernels(log: Path, seconds: float) -> str:
    """Compile every Triton kernel for sm_90, without a GPU; what went wrong, or "".

    Raises:
        TimeoutError: the time was up before the last.
    """
    code = "import bench.gpu.checkout, sys; from apv_fast.kernels.aot import main; sys.exit(main(['--arch', '90']))"
    with log.open("ab") as output:
        try:
            process = subprocess.run(
                [sys.executable, "-c", code], cwd=ROOT, env=environment(), stdout=output, stderr=output, timeout=seconds
            )
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"not all of them in {seconds:.0f} s") from error
    last = log.read_text(errors="replace").strip().splitlines()[-1:]
    return "" if process.returncode == 0 else f"exit status {process.returncode}: {' '.join(last)}"


def without_gpu(ledger: Ledger, probe: build.Probe, folder: Path) -> int:
    """What can be done without one; no figures, no file."""
    make_library(ledger, probe, folder)
    say("compiling the Triton kernels for sm_90")
    try:
        if error := compile_kernels(folder / "compile.log", COMPILE_SECONDS):
            ledger.broke("Triton kernels", error)
    except TimeoutError as error:
        ledger.skip("Triton kernels", str(error))
    problems = ledger.report["problems"]
    for what, how in problems.items():
        print(f"BROKEN {what}: {how}")
    for what, why in ledger.report["not_run"].items():
        print(f"not run: {what}: {why}")
    print("compilation: " + ("see above" if problems else "no error"))
    print(NO_GPU)
    return 1 if problems else 0


def with_gpu(ledger: Ledger, probe: build.Probe, options: argparse.Namespace, folder: Path, scratch: Path) -> int:
    """Everything; prints the table."""
    if unpacked := cache.unpack():
        say(f"compiled kernels: {unpacked}")
    cached = (CACHE / "inductor").is_dir()
    for line in forecast.lines(options.sections, library=probe.library, cached=cached, peers=forecast.named()):
        say(line)
    make_library(ledger, probe, folder)
    Stages(ledger, options.sections, folder, scratch, options.only, options.sanitize).run()
    ledger.report["complete"] = True
    ledger.save()
    report = ledger.report
    machine = with_ceilings(MACHINES["h200"], report["ceilings"], report["machine"].get("GPU", ""))
    print(f"\nwrote {ledger.path} after {report['seconds']:.0f} s\n")
    print(table.render(report, machine), flush=True)
    return 1 if report["problems"] else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 0 if everything that ran went well, 1 if something failed or broke."""
    clock = Clock()  # first of all: what comes before a stage is taken from its time
    options = parse(None if arguments is None else list(arguments))
    clock.seconds, clock.sections = options.seconds, options.sections
    scratch = ROOT / "build" / "device"
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        probe = build.look()
    except RuntimeError as error:
        print(f"BROKEN PyTorch: {error}\n{NO_GPU}")
        return 1
    path = (options.json or default_file(probe.gpu)) if probe.gpu else None
    folder = path.parent if path and os.environ.get("OUT") else scratch
    folder.mkdir(parents=True, exist_ok=True)
    for old in {*folder.glob("*.log"), *scratch.glob("*.log")}:
        old.unlink()
    ledger = Ledger(path, facts(), clock)
    ledger.save()
    if path is None:
        return without_gpu(ledger, probe, folder)
    return with_gpu(ledger, probe, options, folder, scratch)


if __name__ == "__main__":
    sys.exit(main())

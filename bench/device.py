"""``python -m bench.device``: everything that only a GPU can prove, in one command of under nine minutes.

Builds the checkout in place, runs the GPU's selection of the tests, measures what the machine can do, times every op
and both updates against their rivals, holds the results against the targets, and prints a short table last. All of it
also goes to a JSON file. A bare machine is enough: PyTorch with Triton, nvcc, CMake, Ninja, pybind11, pytest and
hypothesis.

Every section has a share of the time. What does not fit is listed as not run; what fails is listed and does not stop
the rest. The exit status is 0 if all that ran went well, 1 if a test failed or something broke. Without a GPU it
builds, compiles the Triton kernels, says that nothing was measured, and prints no figure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.cost.machine import MACHINES, with_ceilings
from bench.gpu import build, suite, table
from bench.gpu.checkout import ROOT, environment
from bench.gpu.jobs import Job, Worker, run_to_the_end
from bench.gpu.ledger import Ledger
from bench.gpu.targets import is_ours

SECONDS = 510.0  # of the nine minutes, 30 are left for what cannot be stopped at once
# When each section must have ended, as a share of the time; what one does not use goes to the next.
ENDS = {"build": 0.18, "tests": 0.48, "ceilings": 0.54, "contests": 1.0}
SECTIONS = tuple(ENDS)
MINIMUM = 8.0  # seconds under which no contest is begun
PASS_SECONDS = 1.2  # of rounds, a pass of a contest
COMPILE_SECONDS = 300.0  # for all Triton kernels, without a GPU
CEILINGS = ("copy", "matrix", "launch", "l2")
BARRIERS = ("triton", "cuda")
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
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


class Run:
    """One run: its clock, what it found so far."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.ledger = Ledger(options.seconds)
        self.report: dict[str, Any] = {
            "machine": facts(),
            "build": {},
            "tests": {},
            "sanitizer": {},
            "ceilings": {},
            "rows": [],
            "left_out": {},
        }

    def section(self, name: str, work: Callable[[float], None]) -> None:
        """Do ``work`` with the section's end, unless it was not asked for or its time is up."""
        if name not in self.options.sections:
            self.ledger.skip(name, "not asked for")
            return
        last = max(self.options.sections, key=SECTIONS.index)
        until = self.ledger.until(1.0 if name == last else ENDS[name])
        if self.ledger.left(until) < MINIMUM:
            self.ledger.skip(name, "no time left")
            return
        say(f"{name}: up to {self.ledger.left(until):.0f} s")
        try:
            work(until)
        except Exception as error:
            self.ledger.broke(name, f"{type(error).__name__}: {error}")

    def build(self, until: float) -> None:
        """See :mod:`bench.gpu.build`."""
        self.report["build"] = build.build(self.folder / "build.log", self.ledger.left(until))
        if error := self.report["build"].get("error"):
            self.ledger.broke("build", error)

    def tests(self, until: float) -> None:
        """See :mod:`bench.gpu.suite`."""
        report, log = self.folder / "tests.jsonl", self.folder / "tests.log"
        self.report["tests"] = found = suite.run(report, log, self.ledger.left(until))
        self._judge("tests", found)
        if self.options.sanitize:
            report, log = self.folder / "sanitizer.jsonl", self.folder / "sanitizer.log"
            self.report["sanitizer"] = suite.sanitize(report, log, self.ledger.left(until))
            self._judge("compute-sanitizer", self.report["sanitizer"])

    def _judge(self, name: str, found: dict[str, Any]) -> None:
        if found["not_run"]:
            why = "their time was up" if found["stopped"] else "pytest ended before them"
            self.ledger.skip(f"{found['not_run']} of {found['collected']} {name}", why)
        if found["failed"]:
            self.ledger.broke(name, f"{found['failed']} failed")
        elif found.get("error"):
            self.ledger.broke(name, found["error"])
        elif not found["passed"]:
            self.ledger.broke(name, "none passed")

    def device(self, worker: Worker) -> bool:
        """Ask the GPU what it is; whether there is one to go on with."""
        outcome = worker.run(Job("device", "device", seconds=60))
        if outcome.error:
            self.ledger.broke("device", outcome.error)
            return False
        self.report["machine"] |= {name: value for name, value in outcome.result.items()}
        self.report["ceilings"] |= {name: outcome.result[name] for name in ("sms", "l2_bytes")}
        return True

    def ceilings(self, worker: Worker, until: float) -> None:
        """Measure the machine; see :mod:`bench.gpu.ceilings` and :mod:`bench.gpu.barrier`."""
        kinds = [("ceiling", name) for name in CEILINGS] + [("barrier", name) for name in BARRIERS]
        found = self.report["ceilings"]
        for kind, name in kinds:
            left = self.ledger.left(until)
            if left < MINIMUM:
                self.ledger.skip(f"{kind} {name}", "no time left")
                continue
            outcome = worker.run(Job(f"{kind} {name}", kind, {"name": name}, min(left, 60)))
            if outcome.error:
                self.ledger.broke(f"{kind} {name}", outcome.error)
            else:
                found |= outcome.result
        if barriers := [found[f"barrier_{name}_us"] for name in BARRIERS if f"barrier_{name}_us" in found]:
            found["barrier_us"] = min(barriers)

    def contests(self, worker: Worker, until: float) -> None:
        """Time what there is time for; see :mod:`bench.gpu.contests`."""
        listed = worker.run(Job("list", "list", seconds=60))
        if listed.error:
            self.ledger.broke("contests", listed.error)
            return
        for one in listed.result:
            name, left = one["name"], self.ledger.left(until)
            if self.options.only not in name:
                continue
            if left < MINIMUM:
                self.ledger.skip(name, "no time left")
                continue
            job = Job(name, "contest", {"name": name, "pass_seconds": PASS_SECONDS}, one["seconds"])
            outcome, broken = run_to_the_end(worker, job, until=until)
            say(f"{name}: {outcome.seconds:.0f} s{', ' + outcome.error if outcome.error else ''}")
            for contestant, how in broken.items():
                self._lost(f"{name}: {contestant}", how, fault=is_ours(contestant))
            if outcome.error and self.ledger.left(until) < 1:
                self.ledger.skip(name, "the time was up while it ran")
            elif outcome.error:
                self.ledger.broke(name, outcome.error)
            else:
                self.report["rows"] += outcome.result["rows"]
                self.report["left_out"] |= {f"{name}: {who}": why for who, why in outcome.result["left_out"].items()}
                for who, why in outcome.result["failed"].items():
                    self.ledger.broke(f"{name}: {who}", why)

    def _lost(self, what: str, how: str, *, fault: bool) -> None:
        """A contestant that hung or died: a problem if it is ours, else only a row that is missing."""
        if fault:
            self.ledger.broke(what, how)
        else:
            self.report["left_out"][what] = how

    def finish(self) -> dict[str, Any]:
        """The report, complete."""
        taken = round(time.monotonic() - self.ledger.start, 1)
        return self.report | {"problems": self.ledger.problems, "not_run": self.ledger.not_run, "seconds": taken}


def say(line: str) -> None:
    """A line of progress, with the time."""
    print(f"[{datetime.now(UTC):%H:%M:%S}] {line}", flush=True)


def gpu_name() -> str:
    """The GPU's name, asked in another process so that this one never holds the device; "" without one.

    Raises:
        RuntimeError: PyTorch cannot say; the last line of its error.
    """
    code = "import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else '')"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    if process.returncode:
        raise RuntimeError(process.stderr.strip().splitlines()[-1])
    return process.stdout.strip()


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


def without_gpu(run: Run) -> int:
    """What can be done without one; no figures."""
    run.section("build", lambda until: run.build(run.ledger.until(1.0)))  # no other section needs the time
    say("compiling the Triton kernels for sm_90")
    try:
        if error := compile_kernels(run.folder / "compile.log", COMPILE_SECONDS):
            run.ledger.broke("Triton kernels", error)
    except TimeoutError as error:
        run.ledger.skip("Triton kernels", str(error))
    for what, how in run.ledger.problems.items():
        print(f"BROKEN {what}: {how}")
    for what, why in run.ledger.not_run.items():
        print(f"not run: {what}: {why}")
    print("build and compilation: " + ("see above" if run.ledger.problems else "no error"))
    print(NO_GPU)
    return 1 if run.ledger.problems else 0


def with_gpu(run: Run, path: Path) -> int:
    """Everything; writes the report to ``path`` and prints the table."""
    run.section("build", run.build)
    run.section("tests", run.tests)
    with Worker("bench.gpu.work", run.folder / "device.log") as worker:
        if run.device(worker):
            run.section("ceilings", lambda until: run.ceilings(worker, until))
            run.section("contests", lambda until: run.contests(worker, until))
    report = run.finish()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    machine = with_ceilings(MACHINES["h100"], report["ceilings"], report["machine"].get("GPU", ""))
    print(f"\nwrote {path} after {report['seconds']:.0f} s\n")
    print(table.render(report, machine), flush=True)
    return 1 if report["problems"] else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 0 if everything that ran went well, 1 if something failed or broke."""
    options = parse(None if arguments is None else list(arguments))
    try:
        gpu = gpu_name()
    except RuntimeError as error:
        print(f"BROKEN PyTorch: {error}\n{NO_GPU}")
        return 1
    path = options.json or default_file(gpu)
    folder = path.parent if gpu and os.environ.get("OUT") else ROOT / "build" / "device"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.log"):
        old.unlink()
    run = Run(options, folder)
    return with_gpu(run, path) if gpu else without_gpu(run)


if __name__ == "__main__":
    sys.exit(main())

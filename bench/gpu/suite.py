"""Runs the GPU's selection of the tests (``pytest -m gpu``) in a process of its own, and reads what came out."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.gpu.checkout import ROOT, environment
from bench.gpu.plugin import VARIABLE

PROCESSES = 12  # most of the time goes to compiling kernels, which the CPU does
THREADS = "2"  # of each, on the CPU
TEST_SECONDS = 240  # after which a test is taken to hang; some compile a kernel for each of many shapes
SANITIZED = "sanitize"  # tests under compute-sanitizer: marked so, small shapes
TESTS = ("tests",)


def command(expression: str, *, processes: int) -> list[str]:
    """pytest on the tests that ``expression`` selects, in as many processes as help and are possible."""
    parts = [sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu.checkout", "-p", "bench.gpu.plugin"]
    parts += [
        "-m",
        expression,
        "--no-header",
        "--tb=short",
        "--continue-on-collection-errors",
        "-o",
        "cache_dir=build/.pytest_cache",
    ]
    if importlib.util.find_spec("xdist") and processes > 1:
        parts += ["-n", str(processes), "--dist", "load", "--maxschedchunk", "1"]  # keeps the order
    if importlib.util.find_spec("pytest_timeout"):
        # By a thread: a signal's handler would wait for the call into CUDA that hangs.
        parts += ["--timeout", str(TEST_SECONDS), "--timeout-method", "thread"]
    return [*parts, *TESTS]


def run(report: Path, log: Path, seconds: float, *, expression: str = "gpu and not slow") -> dict[str, Any]:
    """Run the tests for at most ``seconds``.

    Returns:
        See :func:`summary`; "stopped" says whether the time was up, "status" is pytest's exit status.
    """
    report.unlink(missing_ok=True)
    processes = min(PROCESSES, os.cpu_count() or 1)
    return _finish(command(expression, processes=processes), report, log, seconds)


def sanitize(report: Path, log: Path, seconds: float) -> dict[str, Any]:
    """The tests on small shapes under compute-sanitizer, which stops them at the first bad access."""
    report.unlink(missing_ok=True)
    tool = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all"]
    return _finish([*tool, *command(SANITIZED, processes=1)], report, log, seconds)


def _finish(command: list[str], report: Path, log: Path, seconds: float) -> dict[str, Any]:
    start = time.monotonic()
    stopped, status = False, -1
    env = environment(**{VARIABLE: str(report), "OMP_NUM_THREADS": THREADS})
    with log.open("ab") as output:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return summary([]) | {"error": str(error), "status": -1, "stopped": False, "seconds": 0.0}
        try:
            status = process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            stopped = True
        finally:  # also when this process is interrupted
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    result = summary(read(report)) | {"stopped": stopped, "status": status}
    # 0: passed, 1: some failed, 5: nothing was selected; all else never came to run the tests
    if not stopped and status not in (0, 1, 5) and not result["failures"]:
        last = log.read_text(errors="replace").strip().splitlines()[-3:]
        result["error"] = f"pytest's exit status is {status}: {' | '.join(last)}"[:600]
    return result | {"seconds": round(time.monotonic() - start, 1)}


def read(report: Path) -> list[dict[str, Any]]:
    """The lines of a report; the last may be cut off where its writer was killed."""
    found = []
    for line in report.read_text().splitlines() if report.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def summary(lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Of a report's lines: how many tests were "collected", "passed", "failed", "skipped", "not_run"; "failures" (test,
    why), "unfinished" (begun and without a result), "skips" (why -> how many) and the "slowest" tests.
    """
    found: dict[str, dict[str, Any]] = {}
    started: dict[str, None] = {}
    collected = 0
    for line in lines:
        if "started" in line:
            started[line["started"]] = None
        elif "collected" in line:
            collected = max(collected, line["collected"])
        elif line["test"] not in found or line["outcome"] in ("failed", "error"):
            found[line["test"]] = line
    counts = Counter("failed" if line["outcome"] == "error" else line["outcome"] for line in found.values())
    bad = [line for line in found.values() if line["outcome"] in ("failed", "error")]
    skips = Counter(line["why"].removeprefix("Skipped: ") for line in found.values() if line["outcome"] == "skipped")
    slowest = sorted(found.values(), key=lambda line: -line["seconds"])[:5]
    return {
        "collected": collected,
        **{name: counts[name] for name in ("passed", "failed", "skipped")},
        "not_run": max(0, collected - sum("::" in test for test in found)),  # else a module
        "failures": [{"test": line["test"], "why": line["why"]} for line in bad],
        "unfinished": [test for test in started if test not in found],
        "skips": dict(skips),
        "slowest": [{"test": line["test"], "seconds": line["seconds"]} for line in slowest],
    }

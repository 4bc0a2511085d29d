"""Runs the GPU's selection of the tests (``pytest -m gpu``) in a process of its own, and reads what came out.

``test_gpu.py``, which holds what only a GPU can show, runs before the others are even collected.
"""

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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.checkout import ROOT, environment

VARIABLE = "APV_FAST_TEST_REPORT"  # the file that bench.gpu.plugin writes to

PROCESSES = 12  # most of the time goes to compiling kernels, which the CPU does
THREADS = "2"  # of each, on the CPU
TEST_SECONDS = 240  # after which a test is taken to hang; some compile a kernel for each of many shapes
SANITIZED = "sanitize"  # tests under compute-sanitizer: marked so, small shapes
PARTS = (("tests/test_gpu.py",), ("tests", "--ignore=tests/test_gpu.py"))  # one after the other
WAIT = 2.0  # seconds between two looks at the results

Progress = Callable[[dict[str, Any]], None]


def command(expression: str, part: Sequence[str], *, processes: int) -> list[str]:
    """pytest on the tests of ``part`` that ``expression`` selects, in as many processes as help and are possible."""
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
    return [*parts, *part]


def run(
    report: Path, log: Path, seconds: float, *, expression: str = "gpu and not slow", progress: Progress | None = None
) -> dict[str, Any]:
    """Run the tests for at most ``seconds``; ``progress`` is given the summary until now every other second.

    Returns:
        See :func:`summary`; "stopped" says whether the time was up, "status" is the last exit status of pytest.
    """
    processes = min(PROCESSES, os.cpu_count() or 1)
    commands = [command(expression, part, processes=processes) for part in PARTS]
    return _finish(commands, report, log, seconds, progress)


def sanitize(report: Path, log: Path, seconds: float) -> dict[str, Any]:
    """The tests on small shapes under compute-sanitizer, which stops them at the first bad access."""
    tool = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all"]
    return _finish([[*tool, *command(SANITIZED, PARTS[0], processes=1)]], report, log, seconds, None)


def _finish(
    commands: Sequence[list[str]], report: Path, log: Path, seconds: float, progress: Progress | None
) -> dict[str, Any]:
    start = time.monotonic()
    report.unlink(missing_ok=True)
    stopped, status, error = False, -1, ""
    for one in commands:
        left = seconds - (time.monotonic() - start)
        with report.open("a") as file:
            file.write(json.dumps({"part": one}) + "\n")
        try:
            stopped, status = _wait(one, report, log, left, progress)
        except OSError as broken:
            error = str(broken)
            break
        # 0: passed, 1: some failed, 5: nothing was selected; all else never came to run the tests
        if not stopped and status not in (0, 1, 5) and not summary(read(report))["failures"]:
            last = log.read_text(errors="replace").strip().splitlines()[-3:]
            error = f"pytest's exit status is {status}: {' | '.join(last)}"[:600]
        if stopped:
            break
    result = summary(read(report)) | {"stopped": stopped, "status": status}
    return result | ({"error": error} if error else {}) | {"seconds": round(time.monotonic() - start, 1)}


def _wait(command: list[str], report: Path, log: Path, seconds: float, progress: Progress | None) -> tuple[bool, int]:
    """Run ``command`` until it or the time ends: whether the time was up, and its exit status."""
    end = time.monotonic() + seconds
    env = environment(**{VARIABLE: str(report), "OMP_NUM_THREADS": THREADS})
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while True:
                try:
                    return False, process.wait(min(WAIT, max(0.0, end - time.monotonic())))
                except subprocess.TimeoutExpired:
                    if progress is not None:
                        progress(summary(read(report)))
                    if time.monotonic() >= end:
                        return True, -1
        finally:  # also when this process is interrupted
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def read(report: Path) -> list[dict[str, Any]]:
    """The lines of a report; the last may be cut off where its writer was killed."""
    lines = []
    for line in report.read_text().splitlines() if report.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def summary(lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Of a report's lines: how many tests were "collected", "passed", "failed", "skipped", "not_run"; "failures" (test,
    why), "unfinished" (begun and without a result), "skips" (why -> how many) and the "slowest" tests.
    """
    results: dict[str, dict[str, Any]] = {}
    started: dict[str, None] = {}
    parts = collected = before = 0  # begun; tests in all, and those of the parts before this one
    for line in lines:
        if "part" in line:
            parts, before = parts + 1, collected
        elif "started" in line:
            started[line["started"]] = None
        elif "collected" in line:
            collected = max(collected, before + line["collected"])  # every process says so
        elif line["test"] not in results or line["outcome"] in ("failed", "error"):
            results[line["test"]] = line
    counts = Counter("failed" if line["outcome"] == "error" else line["outcome"] for line in results.values())
    bad = [line for line in results.values() if line["outcome"] in ("failed", "error")]
    skips = Counter(line["why"].removeprefix("Skipped: ") for line in results.values() if line["outcome"] == "skipped")
    slowest = sorted(results.values(), key=lambda line: -line["seconds"])[:5]
    return {
        "parts": parts,
        "collected": collected,
        **{name: counts[name] for name in ("passed", "failed", "skipped")},
        "not_run": max(0, collected - sum("::" in test for test in results)),  # else a module
        "failures": [{"test": line["test"], "why": line["why"]} for line in bad],
        "unfinished": [test for test in started if test not in results],
        "skips": dict(skips),
        "slowest": [{"test": line["test"], "seconds": line["seconds"]} for line in slowest],
    }

"""A plugin of pytest (``-p bench.gpu.plugin``): every test's result goes to a file as soon as it is there.

So a run that is stopped, or dies, leaves the results until then. The file, lines of JSON, is named by the environment
variable :data:`bench.gpu.suite.VARIABLE`. Works under pytest-xdist, where the process that collects the results writes
them.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

import pytest

from bench.gpu.suite import VARIABLE

OURS = ("apv_fast", "bench", "tests")
# In this order, since every size is a kernel to compile and the time may be up before the last: the barrier and full
# sizes, then of the shared bodies the sizes that differ most, all else, and what is not about the kernels.
FIRST = "test_gpu.py"
EARLY = ("barrier", "wrong_order", "small")
SCANS = ("test_rssm_", "test_stacked_")
TELLING = ("odd", "gaussian", "wide")
LAST = ("any_shape", "opcheck", "compiles", "gradcheck", "fake")


def _write(**line: Any) -> None:
    if path := os.environ.get(VARIABLE):
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")


def _in_worker() -> bool:
    return "PYTEST_XDIST_WORKER" in os.environ


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What matters most comes first."""

    def rank(item: pytest.Item) -> int:
        def has(words: tuple[str, ...]) -> bool:
            return any(word in item.name for word in words)

        if item.path.name == FIRST:
            return 0 if has(EARLY) else 1
        if has(LAST):
            return 4
        return 2 if has(TELLING) or not item.path.name.startswith(SCANS) else 3

    items.sort(key=rank)


def pytest_collection_finish(session: pytest.Session) -> None:
    """How many tests were selected."""
    if not _in_worker() and session.items:
        _write(collected=len(session.items))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: object, ids: list[str]) -> None:
    """The same under pytest-xdist, once a worker."""
    _write(collected=len(ids))


def pytest_runtest_logstart(nodeid: str) -> None:
    """A test begins: if it has no result later, it was at work when the run ended."""
    if not _in_worker():
        _write(started=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """The result of one test, or of a part of it that failed or was skipped."""
    if _in_worker() or (report.when != "call" and report.outcome == "passed"):
        return
    _write(
        test=report.nodeid,
        outcome=report.outcome if report.when == "call" or report.outcome == "skipped" else "error",
        seconds=round(report.duration, 3),
        why=_first_lines(report),
    )


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A module that cannot be imported; one that needs a package which is not here (a simulator) counts as skipped."""
    if not report.failed or _in_worker():
        return
    missing = re.search(r"No module named '(\w+)", str(report.longrepr))
    if missing and missing[1] not in OURS:
        _write(test=report.nodeid, outcome="skipped", seconds=0.0, why=f"{missing[1]} is not installed")
    else:
        _write(test=report.nodeid, outcome="error", seconds=0.0, why=_first_lines(report))


def _first_lines(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why it failed or was skipped: the message of the assertion or exception."""
    if report.outcome == "passed" or report.longrepr is None:
        return ""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(report.longrepr) if crash is None else str(crash.message)
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    errors = [line.removeprefix("E ").strip() for line in lines if line.startswith("E ")]  # of a module: no message
    lines = errors if crash is None and errors else lines
    return " | ".join(lines[:3])[:400]

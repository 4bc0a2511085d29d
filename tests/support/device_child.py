"""``python -m bench.device`` on a GPU that is not there: its child process for tests, which makes figures up.

As a program it runs the whole command with itself as the child, the tests and the cache of kernels left out. Among the
rivals is one that hangs and one that dies. Imports nothing heavy, so that a run takes a second or two.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GPU = "A GPU that is not there"
SIZES = {"E": 1536, "A": 0, "deter": 1024, "hidden": 1024, "stoch": 32, "discrete": 32}
CONTESTS: dict[str, tuple[str, dict[str, int], str, bool]] = {
    "observe 16": ("rssm_observe", {"B": 16, "T": 50, **SIZES}, "bfloat16", True),
    "observe 50": ("rssm_observe", {"B": 50, "T": 50, **SIZES}, "bfloat16", True),
    "returns": ("lambda_return", {"H": 15, "N": 2500}, "float32", False),
}
CORE = {"cuda": 0.5, "triton": 0.7, "reference": 9.0}
HANGS, DIES = "slow rival", "rival that dies"
RIVALS = {"first rival": 3.0, HANGS: 6.0, DIES: 6.0, "last rival": 2.0}
LIMIT = float(os.environ.get("CONTESTANT_SECONDS", "0.5"))  # of a contestant
CHECKS = ("fine", "wrong")
PAUSE = 0.02  # seconds that everything takes


def run(kind: str, arguments: Mapping[str, Any], tell: Any) -> Any:
    """As :func:`bench.gpu.work.run`."""
    time.sleep(PAUSE)
    if kind == "device":
        return {"GPU": GPU, "sms": 132, "l2_bytes": 60 * 2**20, "pid": os.getpid()}
    if kind == "list":
        return [
            {"name": name, "seconds": LIMIT, "target": target, "rivals": name == "observe 16"}
            for name, (*_, target) in CONTESTS.items()
        ]
    if kind == "checks":
        return list(CHECKS)
    if kind == "check" and arguments["name"] == "wrong":
        raise AssertionError("an error is too large")
    if kind == "ceiling":
        return {f"{arguments['name']}_x": 1.0}
    if kind == "barrier":
        return {f"barrier_{arguments['name']}_us": 1.5 if arguments["name"] == "cuda" else 1.2}
    if kind == "train":
        for i in itertools.count(1):
            tell.item({"updates": i})
            time.sleep(PAUSE)
            if i == 10:
                return {"updates_per_s": 20.0}
    if kind in ("core", "rivals"):
        _compete(kind, arguments, tell)
    return {}


def _compete(kind: str, arguments: Mapping[str, Any], tell: Any) -> None:
    op, shape, dtype, _ = CONTESTS[arguments["contest"]]
    for name, ms in (CORE if kind == "core" else RIVALS).items():
        if name in arguments["without"]:
            continue
        tell.stage(name)
        time.sleep(600.0 if name == HANGS and op == "rssm_observe" else PAUSE)
        if name == DIES:
            os._exit(7)
        row: dict[str, Any] = {"op": op, "shape": shape, "dtype": dtype, "backend": name, "device": "cuda"}
        row |= {"median_ms": ms, "p10_ms": ms, "p90_ms": ms, "runs": 9, "baseline_ratio": None, "cache": "cold"}
        for passed in ("forward", "forward_backward"):
            more = {"beside_ms": {"cuda": 1.0}} if kind == "rivals" else {}
            tell.item({"row": row | {"pass": passed, "peak_mb": None} | more})
        if kind == "rivals":
            tell.finished(name)


def main(arguments: list[str]) -> int:
    """The command; see :func:`bench.device.main`."""
    from bench import device
    from bench.gpu import build, cache, stages, suite

    build.look = lambda seconds=0.0: build.Probe(GPU, library=True)
    build.build = lambda probe, log, seconds: {"library": "none", "nvcc": "", "seconds": 0.0}
    cache.pack = lambda target: "nothing was compiled"
    stages.WORK = __spec__.name if __spec__ else "tests.support.device_child"
    line: dict[str, Any] = {"test": "f::a", "outcome": "passed", "seconds": 1.0, "why": ""}
    lines: list[dict[str, Any]] = [{"part": []}, {"collected": 2}, line]

    def tests(report: Path, log: Path, seconds: float, progress: Any) -> dict[str, Any]:
        progress(suite.summary(lines))
        return suite.summary(lines) | {"stopped": True, "status": -1, "seconds": 2.0}

    suite.run = tests  # type: ignore[assignment]
    return device.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

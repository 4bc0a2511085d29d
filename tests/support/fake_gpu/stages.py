"""``python -m tests.support.fake_gpu.stages [TEXT]``: what each contest compiles at first; figures of a forecast.

Prepares our contestants of every contest whose name contains TEXT on the GPU that is not there, at full size but with
few steps, and prints a line of JSON each: kernels, and seconds of CPU time that Triton spent on them (its compiler,
ptxas and the launchers' C compiler). A contest does not compile what one before it has compiled.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.support import fake_gpu
from tests.support.fake_gpu.__main__ import pretend

STEPS = 6  # of a sequence: kernels are compiled for the number of sequences, not of steps


class Counted:
    """Wraps a function: how often it ran, and the CPU seconds of it and of the programs that it called."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls, self.seconds = function, 0, 0.0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        before = _cpu()
        try:
            return self.function(*arguments, **options)
        finally:
            self.calls, self.seconds = self.calls + 1, self.seconds + _cpu() - before


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


class Called:
    """In place of a recorded graph."""

    def __init__(self, work: Callable[[], object]) -> None:
        work()
        self.replay = work


def on_the_cpu() -> None:
    """Contests with tensors in the CPU's memory, and nothing recorded."""
    from bench.gpu import contests, work

    for module in (contests, work):
        for name, value in (("DEVICE", torch.device("cpu")), ("capture", Called)):
            if hasattr(module, name):
                setattr(module, name, value)


def main(text: str) -> int:
    """Print the lines."""
    torch.set_num_threads(1)
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
    fake_gpu.install(Path(tempfile.mkdtemp()))
    pretend()
    on_the_cpu()
    from dataclasses import replace

    from triton.runtime.jit import JITFunction

    from bench.gpu import work

    compiling = Counted(JITFunction._do_compile)
    JITFunction._do_compile = lambda *a, **k: compiling(*a, **k)
    for contest in work.load():
        if text not in contest.name:
            continue
        shape = {**contest.shape} | ({"T": STEPS} if "T" in contest.shape else {})
        torch.set_float32_matmul_precision("high" if contest.dtype == "tf32" else "highest")
        before, failed = (compiling.calls, compiling.seconds), ""
        for name, prepare in contest.players(replace(contest, shape=shape)).items():
            if name in ("triton", "auto, without a graph"):
                try:
                    for work_ in prepare().values():
                        work_()
                except Exception as error:
                    failed = f"{name}: {error}"
        kernels, seconds = compiling.calls - before[0], round(compiling.seconds - before[1], 1)
        print(
            json.dumps({"contest": contest.name, "kernels": kernels, "seconds": seconds, "failed": failed}), flush=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))

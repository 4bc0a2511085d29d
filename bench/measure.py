"""Times one case: every contestant of every pass, and the peak of their memory where the case asks for it."""

from __future__ import annotations

import functools

import torch

from bench import memory, report
from bench.registry import COMPILED, FORWARD_BACKWARD, Case, Passes, Problem, contestants, wider
from bench.timing import interleaved, warm_up


def measure(
    case: Case, device: torch.device, seconds: float, *, slow: bool = False
) -> tuple[list[report.Row], dict[str, str]]:
    """Rows of a case, and why a contestant has none; those that take minutes to compile only if ``slow``."""
    torch.manual_seed(0)
    torch.compiler.reset()  # else a second shape of the same function compiles for any shape
    names, left_out = contestants(case, device)
    problem: Problem = case.build(device, case.dtype, **case.shape)
    ready: dict[str, Passes] = {}
    for name in names:
        ready[name] = {passed: functools.partial(run, name) for passed, run in problem.passes.items()}
    for name, other in {**problem.others, **wider(case, device)}.items():
        if other.slow and not slow:
            left_out[name] = "it takes minutes to compile: --slow"
            continue
        try:
            passes = {passed: work for passed, work in other.prepare().items() if passed in problem.passes}
            for work in passes.values():
                warm_up(work)
        except Exception as error:  # it may need what is not here, such as torch.compile a compiler
            left_out[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        else:
            ready[name] = passes
    rows: list[report.Row] = []
    for passed in problem.passes:
        works = {name: passes[passed] for name, passes in ready.items() if passed in passes}
        rows += report.rows(case, passed, device, interleaved(works, device, seconds))
    if case.memory and device.type == "cpu":
        add_peaks(case, rows, left_out)
    return rows, left_out


def add_peaks(case: Case, rows: list[report.Row], left_out: dict[str, str]) -> None:
    """Put ``peak_mb`` into the rows with gradients; torch.compile's would be that of its compiler."""
    for row in rows:
        if row["pass"] == FORWARD_BACKWARD and row["backend"] != COMPILED:
            try:
                row["peak_mb"] = memory.peak(case, row["backend"])
            except RuntimeError as error:
                left_out["peak of memory"] = str(error)
                return

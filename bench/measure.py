"""Times one case: every contestant of every pass, and the peak of their memory where the case asks for it."""

from __future__ import annotations

import functools

import torch

from bench import memory, report
from bench.registry import COMPILED, FORWARD_BACKWARD, Case, Problem, contestants, run_wider
from bench.timing import interleaved, warm_up


def measure(
    case: Case, device: torch.device, seconds: float, *, slow: bool = False
) -> tuple[list[report.Row], dict[str, str]]:
    """Rows of a case, and why a contestant has none; rivals that take minutes to prepare only if ``slow``."""
    torch.manual_seed(0)
    torch.compiler.reset()  # else a second shape of the same function compiles for any shape
    names, left_out = contestants(case, device)
    problem: Problem = case.build(device, case.dtype, **case.shape)
    wider = run_wider(case, device)
    left_out |= {} if slow else {rival: "it takes minutes to compile: --slow" for rival in problem.slow_rivals}
    rivals = [*problem.rivals, *(problem.slow_rivals if slow else ()), *wider]
    rows: list[report.Row] = []
    for passed, run in problem.passes.items():
        works = {name: functools.partial(run, name) for name in names}
        for rival in rivals:
            work = functools.partial(wider[rival][passed] if rival in wider else run, rival)
            try:
                warm_up(work)
            except Exception as error:  # a rival may need what is not here, such as torch.compile a compiler
                left_out[rival] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            else:
                works[rival] = work
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

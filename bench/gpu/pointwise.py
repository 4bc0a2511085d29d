"""Contests of the ops beside the scans: for each op of the registry that a backend for GPUs has, its largest case."""

from __future__ import annotations

import functools
import math

from bench.gpu.contests import (
    COLD,
    CONTESTS,
    DEVICE,
    GRAPH,
    WARM,
    Contest,
    Passes,
    Players,
    Prepare,
    backends_of,
)
from bench.gpu.graphs import capture
from bench.registry import REFERENCE, Case, Problem, select


def _prepare(problem: Problem, name: str, graph: bool) -> Passes:
    works = {passed: functools.partial(run, name) for passed, run in problem.passes.items()}
    return {passed: capture(work).replay for passed, work in works.items()} if graph else works


def _players(case: Case, contest: Contest) -> Players:
    problem: Problem = case.build(DEVICE, case.dtype, **case.shape)
    players: dict[str, Prepare] = {}
    for name in backends_of(*case.uses):
        players[name] = functools.partial(_prepare, problem, name, True)
    players[REFERENCE] = functools.partial(_prepare, problem, REFERENCE, False)
    for name in (REFERENCE, *problem.rivals):
        players[name + GRAPH] = functools.partial(_prepare, problem, name, True)
    return players


def largest() -> list[Case]:
    """Of every op and dtype that has no contest yet, the case with the most numbers; whole updates are no ops."""
    known = {contest.op for contest in CONTESTS}
    found: dict[tuple[str, str], Case] = {}
    for case in select(slow=True):
        if case.op in known or case.uses != (case.op,) or not backends_of(case.op):
            continue
        key = (case.op, case.dtype_name)
        if key not in found or math.prod(case.shape.values()) > math.prod(found[key].shape.values()):
            found[key] = case
    return list(found.values())


def register() -> None:
    """Make a contest of each of them. Both caches: in an update their inputs have just been written."""
    for case in largest():
        players = functools.partial(_players, case)
        CONTESTS.append(Contest(case.op, case.shape, case.dtype_name, players, 60.0, (COLD, WARM)))

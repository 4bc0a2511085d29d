"""What ``bench.device`` times against what: a contest is a case of :mod:`bench.registry` with its contestants.

They are "reference" (PyTorch, eager), the same recorded as a CUDA graph, every backend for GPUs that the table in
:mod:`apv_fast.backend` has for the op, recorded too, since that is how a training update runs them, and the others
that the case knows: ``torch.compile``, around loops and around a scan, yardsticks that are no implementation of the op.
Of whole updates, which record themselves, "auto" stands for all backends, and other projects' updates
(:mod:`bench.peers`) compete where an environment variable names their checkout. Nothing here names a kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from apv_fast.backend import AUTO_ORDER, IMPLEMENTATIONS
from bench.gpu.graphs import capture
from bench.gpu.targets import is_ours
from bench.peers import remote
from bench.peers.setup import UPDATES
from bench.registry import COLD, COMPILED, FORWARD_BACKWARD, REFERENCE, Case, OnDevice, Other, Passes, Problem, Work

DEVICE = torch.device("cuda")
OURS = tuple(name for name in AUTO_ORDER["cuda"] if name != REFERENCE)
GRAPH = " in a graph"
REFERENCE_GRAPH, COMPILED_GRAPH = REFERENCE + GRAPH, COMPILED + GRAPH

Prepare = Callable[[], Passes]  # warms up and records
Players = Mapping[str, Prepare]


class Stated(dict[str, Work]):
    """Passes of a contestant of whom more is to be said: ``facts`` go into its rows, in place of what they have."""

    def __init__(self, passes: Passes, facts: Mapping[str, object]) -> None:
        super().__init__(passes)
        self.facts = dict(facts)


@dataclass(frozen=True)
class Contest:
    """One op at one size and dtype."""

    op: str
    shape: Mapping[str, int]
    dtype: str  # "bfloat16", "tf32" or "float32"
    players: Callable[[Contest], Players]
    seconds: float = 60.0  # a limit for all of it, compilation included
    caches: tuple[str, ...] = (COLD,)  # what L2 holds before each run

    @property
    def name(self) -> str:
        """Unique: op, size, dtype."""
        return f"{self.op} {' '.join(f'{key}={size}' for key, size in self.shape.items())} {self.dtype}"


def contest_of(case: Case) -> Contest:
    """The contest of a case that ``bench.device`` times."""
    how = case.device or OnDevice()
    players = functools.partial(players_of, case)
    return Contest(case.op, case.shape, case.dtype_name, players, how.seconds, how.caches)


def backends_of(*ops: str) -> list[str]:
    """Our backends for GPUs that have all of these ops in the table."""
    return [name for name in OURS if all(name in IMPLEMENTATIONS[op] for op in ops)]


def players_of(case: Case, contest: Contest) -> Players:
    """Who competes in ``case`` at the contest's size: ours, the reference, the others, peers."""
    problem: Problem = case.build(DEVICE, case.dtype, **contest.shape)
    players: dict[str, Prepare] = {}
    for name in backends_of(*case.uses) if len(case.uses) == 1 else ["auto"]:
        players[name] = functools.partial(_backend, problem, name, problem.graph)
    players[REFERENCE] = functools.partial(_backend, problem, REFERENCE, False)
    if problem.graph:
        players[REFERENCE_GRAPH] = functools.partial(_backend, problem, REFERENCE, True)
    for name, other in problem.others.items():
        if not other.slow:
            suffix = GRAPH if other.graph and not is_ours(name) else ""  # ours are recorded anyway
            players[name + suffix] = functools.partial(_other, problem, other)
    return {**players, **_peers(contest)}


def _backend(problem: Problem, name: str, graph: bool) -> Passes:
    return _recorded({passed: functools.partial(run, name) for passed, run in problem.passes.items()}, graph)


def _other(problem: Problem, other: Other) -> Passes:
    passes = {passed: work for passed, work in other.prepare().items() if passed in problem.passes}
    return _recorded(passes, other.graph)


def _recorded(passes: Passes, graph: bool) -> Passes:
    return {passed: capture(work).replay for passed, work in passes.items()} if graph else passes


def _peers(contest: Contest) -> Players:
    """Other projects' updates, whose checkouts are named."""

    def prepare(name: str, path: Path) -> Passes:
        peer = remote.Remote(name, path, contest.op, contest.shape, contest.dtype, DEVICE.type)
        return Stated({FORWARD_BACKWARD: peer.update}, peer.facts)

    named = remote.named(contest.op) if contest.op in UPDATES else {}
    return {remote.TITLES[name]: functools.partial(prepare, name, path) for name, path in named.items()}

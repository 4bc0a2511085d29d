"""How long each stage should take, said when a run begins: a forecast, since nothing of it has run on a GPU.

Measured, on one core of a Xeon without a GPU, in CPU seconds: what Triton takes for the kernels of each contest
(``python -m tests.support.fake_gpu.stages``, ptxas and the launchers' C compiler included), nvcc for the two libraries,
Inductor for the compiled step (forward and backward, to C++). They are taken as they are: the cores of the machine with
the GPU may be faster or slower. Assumed: what a process takes to start, what a contestant takes to be prepared, a whole
compiled update, other projects' updates. Set: how long is timed.

A function that is compiled beside smoke is there afterwards if its compilation ends in time; else it counts again,
whole. What the targets speak of comes first in every stage; what is left of the time goes to the other rivals, and they
are what is cut.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.gpu.ledger import BUDGETS, SECTIONS
from bench.gpu.stages import AFTER_TRAINING, PASS_SECONDS, TOGETHER, TRAIN_SECONDS, compilations
from bench.gpu.targets import is_rival

Functions = tuple[float, ...]  # seconds of compiling each
LOOK, START = 12.0, 8.0  # assumed: importing torch and starting CUDA, from a cold disk and from a warm one
NVCC, NVCC_BARRIER = 26.0, 8.0  # measured; assumed
INDUCTOR = (18.0, 18.0)  # measured, both together: a compiled step, forward and backward
FINETUNE, PRETRAIN = (30.0, 30.0, 10.0), (40.0, 10.0)  # assumed: the losses with their backward, and a step of Adam
PREPARE = 1.5  # assumed: warm up, record both passes, run twice more for the peak of the memory
WARM, ALONE = 0.1, 0.2  # set: before each timing; a contestant by itself
CHECKS, CHECK = 7, 10.0  # assumed: the longest check once its kernels are there, a hundred eager updates
CEILING = 1.5  # assumed: each of six
MOST_KERNELS = 5.2  # measured: of one check
PEER = START + 6.0  # assumed: another project's process, until it has imported and warmed up
PEERS: dict[str, Functions] = {"contextwm": (), "r2dreamer": (), "torchrl": (30.0, 30.0)}  # assumed


@dataclass(frozen=True)
class Contest:
    """What a target's contest costs."""

    triton: float  # measured
    core: int  # contestants of ``core``
    compared: int  # of them, those that take turns with each rival
    rivals: Mapping[str, Functions]  # what they compile; in the order in which they are timed
    timings: int = 2  # passes times states of the cache
    run: float = 0.0  # seconds of the slowest contestant's pass, where that counts
    needed: bool = False  # whether a target speaks of its rivals


GRAPH, COMPILED, SCANNED = "reference in a graph", "torch.compile in a graph", "torch.compile of a scan in a graph"
SCAN: dict[str, Functions] = {GRAPH: (), "triton, a launch a phase": (8.0,)}
OBSERVE: dict[str, Functions] = {GRAPH: (), SCANNED: INDUCTOR, COMPILED: INDUCTOR, "cuDNN LSTM float16": (), **SCAN}
CONTESTS = {
    "rssm_observe B=16": Contest(4.1, 3, 2, OBSERVE, needed=True),
    "rssm_observe B=50": Contest(3.8, 3, 2, OBSERVE),
    "finetune_update B=50": Contest(20.4, 3, 1, {GRAPH: (), COMPILED: FINETUNE}, 1, 0.4, needed=True),
    "pretrain_update B=16": Contest(5.2, 3, 1, {GRAPH: (), COMPILED: PRETRAIN}, 1, 0.05),
    "stacked_observe B=16": Contest(5.9, 5, 2, SCAN),
    "stacked_observe B=50": Contest(6.4, 5, 2, SCAN),
    "knn_bonus Q=2300": Contest(1.6, 2, 1, {GRAPH: (), "torch in a graph": (), COMPILED: (10.0,)}, 2),
}


@dataclass(frozen=True)
class Forecast:
    """Seconds of "start" and of each section."""

    needed: dict[str, float]  # for what the targets speak of
    peers: float  # of that, for other projects' updates
    others: float  # more, for the other rivals

    @property
    def total(self) -> float:
        """All that is needed."""
        return sum(self.needed.values())


def named() -> list[str]:
    """The peers that the environment names."""
    return [name for name in PEERS if os.environ.get(f"APV_FAST_PEER_{name.upper()}")]


def forecast(
    sections: Sequence[str] = SECTIONS, *, library: bool = True, cached: bool = False, peers: Sequence[str] = ()
) -> Forecast:
    """What a run should take.

    Args:
        sections: that are to run.
        library: ``apv_fast/_cuda.so`` is there and loads.
        cached: what an earlier run's smoke has compiled is there.
        peers: of :data:`PEERS`, that are named.
    """
    there = compiled(sections, peers)
    if cached:
        there = compiled(sections, peers, there)
    needed, alone = (_rivals(there, some, needed=True) for some in (peers, ()))
    costs = {
        "start": LOOK + START + (0.0 if library else NVCC),
        "smoke": BUDGETS["smoke"],  # its compilations take what there is
        "core": sum(_core(name, one, there) for name, one in CONTESTS.items()),
        "ceilings": 6 * CEILING,
        "rivals": needed,
        "train": TRAIN_SECONDS + AFTER_TRAINING,
        "tests": BUDGETS["tests"],  # they take what there is
    }
    costs = {name: cost for name, cost in costs.items() if name == "start" or name in sections}
    if "rivals" not in sections:
        return Forecast(costs, 0.0, 0.0)
    return Forecast(costs, needed - alone, _rivals(there, peers, needed=False))


Compiled = Mapping[tuple[str, str], int]  # contest, and "core" or a rival -> functions that are compiled


def compiled(sections: Sequence[str], peers: Sequence[str] = (), before: Compiled | None = None) -> Compiled:
    """What a run has compiled when the timing begins: for a minute, in :data:`TOGETHER` children, which also do checks.

    Args:
        sections: that run.
        peers: that are named.
        before: what was compiled when it began.
    """
    counts = dict(before or {})
    free = [START] * TOGETHER
    if "smoke" in sections:
        free[:CHECKS] = [START + MOST_KERNELS + CHECK] * CHECKS
    heapq.heapify(free)
    listed = [{"name": name, "target": True, "rivals": one.needed} for name, one in CONTESTS.items()]
    for job in compilations(listed, ("core", "rivals")):
        name, at = job.arguments["contest"], heapq.heappop(free)
        chosen = list(_players(name, peers).items())[job.arguments["turn"] :: job.arguments["of"]]
        if job.arguments["who"] == "core":
            chosen = [("core", (CONTESTS[name].triton,))]
        for who, functions in chosen:
            at, done = at + PEER * (who in PEERS), counts.get((name, who), 0)
            for seconds in functions[done:]:
                at += seconds
                counts[name, who] = done = done + (at <= BUDGETS["smoke"])
            at += PREPARE
        heapq.heappush(free, at)
    return counts


def _players(name: str, peers: Sequence[str]) -> dict[str, Functions]:
    """The rivals of a contest, peers included, those whose rows are worth most first."""
    able = {"finetune_update": PEERS, "pretrain_update": {"contextwm": PEERS["contextwm"]}}.get(name.split()[0], {})
    players = {**CONTESTS[name].rivals, **{peer: able[peer] for peer in peers if peer in able}}
    return {who: players[who] for who in sorted(players, key=is_rival, reverse=True)}


def _left(functions: Functions, done: int) -> float:
    return sum(functions[done:])


def _core(name: str, one: Contest, there: Compiled) -> float:
    each = PREPARE + 8 * one.run + one.timings * (WARM + ALONE)
    together = one.timings * (one.core * WARM + max(PASS_SECONDS, 5 * one.run))
    return one.core * each + together + _left((one.triton,), there.get((name, "core"), 0))


def _rivals(there: Compiled, peers: Sequence[str], *, needed: bool) -> float:
    """The rivals that a target speaks of, or the others."""
    return sum(sum(of.values()) for of in rivals(there, peers, needed=needed).values())


def rivals(there: Compiled, peers: Sequence[str], *, needed: bool) -> dict[str, dict[str, float]]:
    """Contest -> rival -> seconds, of those that a target speaks of, or of the others; "ours" are beside them."""
    costs: dict[str, dict[str, float]] = {}
    for name, one in CONTESTS.items():
        players = _players(name, peers)
        timing = one.timings * ((1 + one.compared) * WARM + max(PASS_SECONDS, 5 * one.run))
        costs[name] = {"ours": one.compared * PREPARE} if one.needed == needed else {}
        for who in players:
            if (one.needed and is_rival(who)) == needed:
                start = PEER if who in PEERS else 0.0
                compiling = _left(players[who], there.get((name, who), 0))
                costs[name][who] = start + PREPARE + 8 * one.run + timing + compiling
    return costs


def lines(sections: Sequence[str], *, library: bool, cached: bool, peers: Sequence[str]) -> list[str]:
    """The forecast as text."""
    estimate = forecast(sections, library=library, cached=cached, peers=peers)
    parts = ", ".join(f"{name} {cost:.0f}" for name, cost in estimate.needed.items())
    said = [f"forecast (not measured on a GPU): {estimate.total:.0f} s for what targets speak of: {parts}"]
    if "rivals" in sections:
        who = (
            f"of that {estimate.peers:.0f} s for {', '.join(peers)}" if peers else "no other project's update is named"
        )
        said.append(f"{who}; other rivals would take {estimate.others:.0f} s more, as far as there is time")
    return said

"""How long each stage should take, said when a run begins: a forecast, since nothing of it has run on a GPU.

Measured, on one core of a Xeon without a GPU, in CPU seconds: what Triton takes for the kernels of each contest
(``python -m tests.support.fake_gpu.stages``, ptxas and the launchers' C compiler included), nvcc for the two libraries,
Inductor for the compiled step (forward and backward, to C++). They are taken as they are: the cores of the machine with
the GPU may be faster or slower. Assumed: what a process takes to start, and what a contestant takes to be prepared.
Set: how long is timed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.gpu.ledger import BUDGETS, SECTIONS
from bench.gpu.stages import AFTER_TRAINING, PASS_SECONDS, TRAIN_SECONDS

LOOK, START = 12.0, 8.0  # assumed: importing torch and starting CUDA, from a cold disk and from a warm one
NVCC, NVCC_BARRIER = 26.0, 8.0  # measured; assumed
INDUCTOR = 36.0  # measured: a compiled step, forward and backward
PREPARE = 1.5  # assumed: warm up, record both passes, run twice more for the peak of the memory
WARM, ALONE = 0.1, 0.2  # set: before each timing; a contestant by itself
CHECK = 10.0  # assumed: the longest check once its kernels are there, a hundred eager updates
CEILING = 1.5  # assumed: each of six
MOST_KERNELS = 5.2  # measured: of one check


@dataclass(frozen=True)
class Contest:
    """What a target's contest costs."""

    triton: float  # measured
    core: int  # contestants of ``core``
    compared: int  # of them, those that take turns with each rival
    rivals: Mapping[str, float]  # -> seconds of compiling, measured or assumed
    timings: int = 2  # passes times states of the cache
    run: float = 0.0  # seconds of the slowest contestant's pass, where that counts


GRAPH, COMPILED, SCANNED = "reference in a graph", "torch.compile in a graph", "torch.compile of a scan in a graph"
SCAN = {GRAPH: 0.0, "triton, a launch a phase": 8.0}
OBSERVE = SCAN | {"cuDNN LSTM float16": 0.0, COMPILED: INDUCTOR, SCANNED: INDUCTOR}
CONTESTS = {
    "rssm_observe B=16": Contest(4.1, 3, 2, OBSERVE),
    "rssm_observe B=50": Contest(3.8, 3, 2, OBSERVE),
    # Compiled as a whole: assumed. Updates of other projects come on top, where their checkouts are named.
    "finetune_update B=50": Contest(20.4, 3, 1, {GRAPH: 0.0, COMPILED: 70.0}, 1, 0.4),
    "pretrain_update B=16": Contest(5.2, 3, 1, {GRAPH: 0.0, COMPILED: 50.0}, 1, 0.05),
    "stacked_observe B=16": Contest(5.9, 5, 2, SCAN),
    "stacked_observe B=50": Contest(6.4, 5, 2, SCAN),
    "knn_bonus Q=2300": Contest(1.6, 2, 1, {GRAPH: 0.0, "torch in a graph": 0.0, COMPILED: 10.0}, 2),
}


def seconds(sections: Sequence[str] = SECTIONS, *, library: bool = True) -> dict[str, float]:
    """Forecast seconds of "start" and of each section, compilation in the warm-up taken into account.

    Args:
        sections: that are to run.
        library: ``apv_fast/_cuda.so`` is there and loads.
    """
    side_by_side = BUDGETS["smoke"] - START  # what a child compiles meanwhile is there when it is timed
    slowest = max(cost for one in CONTESTS.values() for cost in (one.triton, *one.rivals.values()))
    checks = START + MOST_KERNELS + CHECK
    found = {
        "start": LOOK + START + (0.0 if library else NVCC),
        "smoke": min(BUDGETS["smoke"], checks + START + slowest + PREPARE),
        "core": sum(_core(one) for one in CONTESTS.values()),
        "ceilings": 6 * CEILING,
        "rivals": sum(_rivals(one, side_by_side) for one in CONTESTS.values()),
        "train": TRAIN_SECONDS + AFTER_TRAINING,
        "tests": BUDGETS["tests"],  # they take what there is
    }
    return {name: cost for name, cost in found.items() if name == "start" or name in sections}


def _core(one: Contest) -> float:
    each = PREPARE + 8 * one.run + one.timings * (WARM + ALONE)
    return one.core * each + one.timings * (one.core * WARM + max(PASS_SECONDS, 5 * one.run))


def _rivals(one: Contest, side_by_side: float) -> float:
    if not one.rivals:
        return 0.0
    timing = one.timings * ((1 + one.compared) * WARM + PASS_SECONDS)
    left = sum(max(0.0, cost - side_by_side) for cost in one.rivals.values())
    return one.compared * PREPARE + left + len(one.rivals) * (PREPARE + 8 * one.run + timing)


def lines(sections: Sequence[str], *, library: bool) -> list[str]:
    """The forecast as text."""
    found = seconds(sections, library=library)
    parts = ", ".join(f"{name} {cost:.0f}" for name, cost in found.items())
    return [f"forecast (not measured on a GPU): {sum(found.values()):.0f} s: {parts}"]

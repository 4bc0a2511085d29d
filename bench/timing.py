"""Interleaved timing: the contestants take turns, so that a slow minute of the machine hits them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping

import torch

Work = Callable[[], object]

MIN_ROUNDS = 5
FEW_ROUNDS = 3  # instead, once they have taken PATIENCE seconds
PATIENCE = 4.0
MAX_ROUNDS = 200
WARM_UP_SECONDS = 0.3
LONG = 1.5  # seconds, after which work is warm once it has run


def interleaved(
    works: Mapping[str, Work],
    device: torch.device,
    seconds: float,
    *,
    cold: bool = True,
    warm: float | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of every run of every contestant, in the same number of rounds.

    Each is warmed up first, for ``warm`` seconds (None: :data:`WARM_UP_SECONDS`). Every round runs each once, in an
    order that rotates. Rounds go on for ``seconds``, but there are at least :data:`MIN_ROUNDS` (of slow work
    :data:`FEW_ROUNDS`) and at most :data:`MAX_ROUNDS`. On a GPU, L2 is flushed before each run, or with ``cold`` off
    left as the run before left it: then a contestant runs twice, the second time timed.
    """
    clock = _CudaClock(device, cold=cold) if device.type == "cuda" else _clock
    for work in works.values():
        warm_up(work, warm)
    names = list(works)
    samples: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for turn in range(MAX_ROUNDS):
            elapsed = time.perf_counter() - start
            if (turn >= MIN_ROUNDS and elapsed > seconds) or (turn >= FEW_ROUNDS and elapsed > PATIENCE):
                break
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(clock(works[name]))
    finally:
        gc.enable()
    return samples


def warm_up(work: Work, seconds: float | None = None) -> None:
    """Run it once, which compiles what is compiled on first use, and again for a moment unless that took long."""
    seconds = WARM_UP_SECONDS if seconds is None else seconds
    begun = time.perf_counter()
    work()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds and start - begun < LONG:
        work()


def _clock(work: Work) -> float:
    start = time.perf_counter()
    result = work()
    elapsed = time.perf_counter() - start
    del result  # freed outside of the timing
    return elapsed * 1e3


class _CudaClock:
    """Times on the GPU's own clock, from a cold L2 cache or from one that the same work has just used."""

    def __init__(self, device: torch.device, *, cold: bool) -> None:
        self.cold = cold
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(2 * size, dtype=torch.int8, device=device)
        self.start, self.end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def __call__(self, work: Work) -> float:
        self.flush.zero_()  # in either case: while it runs, the host gets ahead
        if not self.cold:
            work()
        self.start.record()
        work()
        self.end.record()
        self.end.synchronize()
        return float(self.start.elapsed_time(self.end))

"""What the child process does on the GPU, by kind of job: facts, ceilings, the barrier, contests."""

from __future__ import annotations

import functools
import gc
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from apv_fast.backend import BackendError
from bench.gpu import barrier, ceilings, pointwise
from bench.gpu.contests import CONTESTS, DEVICE, WARM, Contest, Passes, Work
from bench.gpu.targets import is_ours
from bench.gpu.worker import is_broken, message
from bench.registry import REFERENCE
from bench.report import summarize
from bench.timing import interleaved

Stage = Callable[[str], None]
MEGABYTE = 1e6


@functools.cache
def load() -> list[Contest]:
    """Every contest, in the order in which they are worth their time."""
    for name in ("scans", "updates"):  # register themselves
        importlib.import_module(f"bench.gpu.{name}")
    pointwise.register()
    return sorted(CONTESTS, key=_rank)


def _rank(contest: Contest) -> tuple[int, int]:
    """What the targets speak of first; full precision, which is there for comparison, last."""
    ops = ("rssm_observe", "pretrain_update", "finetune_update", "stacked_observe", "knn_bonus", "rssm_rollout")
    dtypes = {"bfloat16": 0, "float32": 0 if contest.op not in ops or contest.op == "knn_bonus" else 2, "tf32": 1}
    return dtypes[contest.dtype], ops.index(contest.op) if contest.op in ops else len(ops)


def run(kind: str, arguments: Mapping[str, Any], stage: Stage) -> Any:
    """Do a job; see :mod:`bench.gpu.worker`."""
    if kind == "device":
        return ceilings.device()
    if kind == "list":
        return [{"name": contest.name, "seconds": contest.seconds} for contest in load()]
    if kind == "ceiling":
        return ceilings.CEILINGS[arguments["name"]]()
    if kind == "barrier":
        return barrier.latency(arguments["name"])
    if kind == "contest":
        found = next(contest for contest in load() if contest.name == arguments["name"])
        return compete(found, arguments, stage)
    raise ValueError(f"unknown kind of job: {kind!r}")


def compete(contest: Contest, arguments: Mapping[str, Any], stage: Stage) -> dict[str, Any]:
    """Prepare every contestant that can be, then time all of them in turns.

    Returns:
        "rows"; contestant -> why it has none: "left_out" if it is a rival, or a backend that says it cannot run this,
        "failed" if it should have.
    """
    torch.manual_seed(0)
    torch.compiler.reset()
    torch.set_float32_matmul_precision("high" if contest.dtype == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = contest.dtype == "tf32"
    stage("the inputs")
    ready: dict[str, Passes] = {}
    peaks: dict[str, float] = {}
    missing: dict[str, dict[str, str]] = {"left_out": {}, "failed": {}}
    for name, prepare in contest.players(contest).items():
        if name in arguments["without"]:
            continue
        stage(name)
        try:
            ready[name], peaks[name] = _prepared(prepare)
        except Exception as error:  # a contestant may need what is not here
            if is_broken(error):
                raise
            fault = is_ours(name) and not isinstance(error, BackendError)
            missing["failed" if fault else "left_out"][name] = message(error)
    stage("")
    return {"rows": _rows(contest, ready, peaks, arguments["pass_seconds"]), **missing}


def _prepared(prepare: Callable[[], Passes]) -> tuple[Passes, float]:
    """A contestant that has run, and the megabytes that it holds at most while it runs, its state included.

    Memory that the allocator has reserved, since that of a CUDA graph counts as free after the recording.
    """
    _forget()
    before = torch.cuda.memory_reserved()
    passes = prepare()
    for work in passes.values():
        work()
    torch.cuda.synchronize()
    _forget()
    torch.cuda.reset_peak_memory_stats()
    for work in passes.values():
        work()
    torch.cuda.synchronize()
    return passes, (torch.cuda.max_memory_reserved() - before) / MEGABYTE


def _forget() -> None:
    """Give memory that is in no use back to the device."""
    gc.collect()
    torch.cuda.empty_cache()


def _rows(
    contest: Contest, ready: Mapping[str, Passes], peaks: Mapping[str, float], seconds: float
) -> list[dict[str, Any]]:
    rows = []
    for passed in dict.fromkeys(name for passes in ready.values() for name in passes):
        works: dict[str, Work] = {name: passes[passed] for name, passes in ready.items() if passed in passes}
        for cache in contest.caches:
            samples = interleaved(works, DEVICE, seconds, cold=cache != WARM)
            for name, times in samples.items():
                row: dict[str, Any] = {"op": contest.op, "backend": name, "device": "cuda", "dtype": contest.dtype}
                row |= {"shape": dict(contest.shape), "pass": passed} | summarize(times, samples.get(REFERENCE))
                row |= {"cache": cache, "peak_mb": round(peaks[name], 1) if len(ready[name]) == 1 else None}
                rows.append(row | getattr(ready[name], "facts", {}))
    return rows

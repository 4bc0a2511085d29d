"""What the child process does on the GPU, by kind of job: facts, checks, ceilings, contests, training."""

from __future__ import annotations

import functools
import gc
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from apv_fast.backend import BackendError
from bench import registry
from bench.gpu import barrier, ceilings
from bench.gpu.contests import DEVICE, Contest, Prepare, contest_of
from bench.gpu.targets import COMPARED, about, is_core, is_ours, is_rival
from bench.gpu.worker import Tell, is_broken, message
from bench.registry import REFERENCE, WARM, Passes, Work
from bench.report import summarize
from bench.timing import interleaved

MEGABYTE = 1e6
WARM_SECONDS = 0.1  # before a contestant is timed; it has run before
ALONE_SECONDS = 0.1  # for the rounds of a contestant that is timed by itself, before the others are ready
Ready = dict[str, tuple[Passes, float]]  # contestant -> its passes, and the megabytes it holds at most
Samples = Mapping[str, list[float]]


@functools.cache
def load() -> list[Contest]:
    """Every contest, in the order in which they are worth their time."""
    return sorted((contest_of(case) for case in registry.load() if case.device), key=_rank)


def _rank(contest: Contest) -> tuple[int, int]:
    """What the targets speak of first; full precision, which is there for comparison, last."""
    ops = ("rssm_observe", "finetune_update", "pretrain_update", "stacked_observe", "knn_bonus", "rssm_rollout")
    dtypes = {"bfloat16": 0, "float32": 0 if contest.op not in ops or contest.op == "knn_bonus" else 2, "tf32": 1}
    return dtypes[contest.dtype], ops.index(contest.op) if contest.op in ops else len(ops)


def run(kind: str, arguments: Mapping[str, Any], tell: Tell) -> Any:
    """Do a job; see :mod:`bench.gpu.worker`."""
    if kind == "device":
        return ceilings.device()
    if kind == "list":
        return [_listed(contest) for contest in load()]
    if kind == "checks":
        return list(importlib.import_module("bench.gpu.smoke").CHECKS)
    if kind == "check":
        return importlib.import_module("bench.gpu.smoke").CHECKS[arguments["name"]]()
    if kind == "ceiling":
        return ceilings.CEILINGS[arguments["name"]]()
    if kind == "barrier":
        return barrier.latency(arguments["name"])
    if kind == "train":
        return importlib.import_module("bench.gpu.train").measure(arguments["seconds"], tell.item)
    if kind in ("core", "rivals", "warm up"):
        contest = next(contest for contest in load() if contest.name == arguments["contest"])
        return {"core": core, "rivals": rivals, "warm up": warm_up}[kind](contest, arguments, tell)
    raise ValueError(f"unknown kind of job: {kind!r}")


def _listed(contest: Contest) -> dict[str, Any]:
    target, rivals = about(contest.op, contest.shape, contest.dtype)
    return {"name": contest.name, "seconds": contest.seconds, "target": target, "rivals": rivals}


def core(contest: Contest, arguments: Mapping[str, Any], tell: Tell) -> None:
    """Ours and the eager reference: each alone as soon as it is ready, then all of them in turns."""
    ready: Ready = {}
    for name, prepare in _players(contest, arguments, tell):
        if is_core(name) and (one := _try(name, prepare, tell)):
            ready[name] = one
            for passed, cache, samples in _time(contest, {name: one}, ALONE_SECONDS):
                tell.item({"row": _row(contest, name, one, passed, cache, samples) | {"alone": True}})
    tell.stage("")
    for passed, cache, samples in _time(contest, ready, arguments["pass_seconds"]):
        for name in samples:
            tell.item({"row": _row(contest, name, ready[name], passed, cache, samples)})


def rivals(contest: Contest, arguments: Mapping[str, Any], tell: Tell) -> None:
    """Every other contestant, one after the other, each in turns with ours, whose times go into its row.

    First those whom a target may be about.
    """
    players = dict(_players(contest, arguments, tell))
    others = _others(players)
    tried = {name: _try(name, players[name], tell) for name in players if others and name in COMPARED}
    ours: Ready = {name: one for name, one in tried.items() if one}
    for name in others:
        one = _try(name, players[name], tell)
        if one:
            for passed, cache, samples in _time(contest, {name: one} | ours, arguments["pass_seconds"]):
                if name in samples:
                    beside = {rival: summarize(samples[rival], None)["median_ms"] for rival in ours if rival in samples}
                    tell.item({"row": _row(contest, name, one, passed, cache, samples) | {"beside_ms": beside}})
        del one
        tell.finished(name)


def warm_up(contest: Contest, arguments: Mapping[str, Any], tell: Tell) -> None:
    """Let contestants compile what they compile, into the caches on disk; times nothing.

    ``arguments``: "who", "core" or "rivals"; of the rivals every "of"th from number "turn" on.
    """
    players = dict(_players(contest, arguments, tell))
    rivals = _others(players)[arguments.get("turn", 0) :: arguments.get("of", 1)]
    for name in filter(is_core, players) if arguments["who"] == "core" else rivals:
        _try(name, players[name], tell)
        tell.finished(name)


def _others(names: Iterable[str]) -> list[str]:
    """The contestants of ``rivals``, whose rows are worth most first."""
    return sorted((name for name in names if not is_core(name)), key=is_rival, reverse=True)


def _players(contest: Contest, arguments: Mapping[str, Any], tell: Tell) -> Iterator[tuple[str, Prepare]]:
    """The contestants but for those that are left out, under the contest's settings."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high" if contest.dtype == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = contest.dtype == "tf32"
    tell.stage("the inputs")
    for name, prepare in contest.players(contest).items():
        if name not in arguments["without"]:
            yield name, prepare


def _try(name: str, prepare: Prepare, tell: Tell) -> tuple[Passes, float] | None:
    """A contestant that is ready, and its megabytes; None, and told why, if it cannot be.

    "left_out": a rival, or a backend that says it cannot run this; "failed": it should have.
    """
    tell.stage(name)
    torch.compiler.reset()
    try:
        return _prepared(prepare)
    except Exception as error:  # a contestant may need what is not here
        if is_broken(error):
            raise
        fault = is_ours(name) and not isinstance(error, BackendError)
        tell.item({"failed" if fault else "left_out": name, "why": message(error)})
        return None


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


def _time(contest: Contest, ready: Ready, seconds: float) -> Iterator[tuple[str, str, Samples]]:
    """Milliseconds of every run of those that are ready, in turns; one pass and state of the cache after the other."""
    for passed in dict.fromkeys(name for passes, _ in ready.values() for name in passes):
        works: dict[str, Work] = {name: passes[passed] for name, (passes, _) in ready.items() if passed in passes}
        for cache in contest.caches:
            yield passed, cache, interleaved(works, DEVICE, seconds, cold=cache != WARM, warm=WARM_SECONDS)


def _row(
    contest: Contest, name: str, one: tuple[Passes, float], passed: str, cache: str, samples: Samples
) -> dict[str, Any]:
    passes, peak = one
    row: dict[str, Any] = {"op": contest.op, "backend": name, "device": "cuda", "dtype": contest.dtype}
    row |= {"shape": dict(contest.shape), "pass": passed} | summarize(samples[name], samples.get(REFERENCE))
    row |= {"cache": cache, "peak_mb": round(peak, 1) if len(passes) == 1 else None}
    return row | getattr(passes, "facts", {})  # what a contestant states of itself

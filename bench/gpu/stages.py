"""The stages of a run on a GPU, most valuable first: smoke, core, ceilings, rivals, train, tests.

Each has an end, notes everything in the ledger as soon as it is known, and costs no other stage anything if it fails.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.gpu import cache, suite
from bench.gpu.jobs import Job, Outcome, Worker, run_to_the_end, run_together
from bench.gpu.ledger import BUDGETS, SECTIONS, Ledger
from bench.gpu.targets import is_ours

WORK = "bench.gpu.work"  # the child's module
WARM_UP = "warm-up"  # smoke without its checks
MINIMUM = 4.0  # seconds under which nothing is begun
PASS_SECONDS = 0.8  # of rounds, a pass of a contest
CHECK_SECONDS = 55.0  # of smoke, all of them side by side
WARM_UP_SECONDS = 300.0
TRAIN_SECONDS = 120.0
AFTER_TRAINING = 8.0  # seconds to end the environments in
TOGETHER = 15  # children at once, while nothing is timed
SHARES = {True: 0.75, False: 0.5}  # of what is left, that one rival gets at most: if a target speaks of it, and if not
TURNS = 5  # children that share the rivals of a contest, while nothing is timed
CEILINGS = ("copy", "matrix", "launch", "l2")
BARRIERS = ("triton", "cuda")


def say(line: str) -> None:
    """A line of progress, with the time."""
    print(f"[{datetime.now(UTC):%H:%M:%S}] {line}", flush=True)


def _worth(contest: Mapping[str, Any]) -> tuple[bool, bool]:
    """The contests whose rivals are worth most come first: a target speaks of them, of ours there, of neither."""
    return not contest["rivals"], not contest["target"]


def compilations(contests: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> list[Job]:
    """What compiles the contestants of ``kinds``, "core" and "rivals", of every row that a target speaks of.

    First the contests in which a target speaks of rivals, which compile longest; then ours; then the other rivals.
    """
    jobs: list[Job] = []
    late: list[Job] = []
    for one in sorted((one for one in contests if one["target"]), key=_worth):
        for kind in kinds:
            turns = TURNS if kind == "rivals" else 1
            for turn in range(turns):
                arguments = {"contest": one["name"], "who": kind, "turn": turn, "of": turns, "without": []}
                name = f"{kind} of {one['name']}, part {turn + 1}"
                job = Job(name, "warm up", arguments, WARM_UP_SECONDS)
                (jobs if one["rivals"] or kind == "core" else late).append(job)
    return jobs + late


class Stages:
    """Does the stages, in the ledger's time.

    Args:
        ledger: of the run.
        sections: the stages to do.
        folder: for what comes back beside the report: logs, results of tests, the cache of kernels.
        scratch: for logs that nobody needs unless something broke.
        only: text that a contest's name must contain.
        sanitize: also the small tests under compute-sanitizer.
    """

    def __init__(
        self,
        ledger: Ledger,
        sections: Sequence[str],
        folder: Path,
        scratch: Path,
        only: str = "",
        sanitize: bool = False,
    ) -> None:
        self.ledger, self.clock, self.sections, self.only = ledger, ledger.clock, sections, only
        self.folder, self.scratch, self.sanitize = folder, scratch, sanitize
        self.worker = Worker(WORK, folder / "device.log")
        self.contests: list[dict[str, Any]] = []

    def run(self) -> None:
        """All stages that were asked for."""
        for name in SECTIONS:
            self.ledger.skip(name, "the run ended before it" if name in self.sections else "not asked for")
        with self.worker:
            if not self._begin():
                return
            if {"smoke", "core", "rivals"} & set(self.sections):
                self._section("smoke" if "smoke" in self.sections else WARM_UP, self.smoke)
                self._keep_kernels()
            for name in SECTIONS[1:]:
                if name in self.sections:
                    self._section(name, getattr(self, name))
        self._keep_kernels()

    def _begin(self) -> bool:
        """Ask the GPU what it is, and what contests there are; whether there is something to go on with."""
        for name, kind in (("the device", "device"), ("the contests", "list")):
            outcome = self.worker.run(Job(name, kind, seconds=60))
            if outcome.error:
                self.ledger.broke(name, outcome.error)
                return False
            if kind == "device":
                self.ledger.note("machine", **outcome.result)
                self.ledger.note("ceilings", **{name: outcome.result[name] for name in ("sms", "l2_bytes")})
            else:
                self.contests = [one for one in outcome.result if self.only in one["name"]]
        return True

    def _section(self, name: str, work: Callable[[float], None]) -> None:
        until = self.clock.until("smoke" if name == WARM_UP else name)
        if name in ("smoke", WARM_UP):
            until = min(until, time.monotonic() + BUDGETS["smoke"])
        if self.clock.left(until) < MINIMUM:
            if name != WARM_UP:
                self.ledger.skip(name, "no time left")
            return
        say(f"{name}: up to {self.clock.left(until):.0f} s")
        try:
            self.ledger.skip(name, "the run ended while it was at work")
            work(until)
        except Exception as error:
            self.ledger.broke(name, f"{type(error).__name__}: {error}")
        self.ledger.went(name)

    def _keep_kernels(self) -> None:
        try:
            self.ledger.note("build", kernels=cache.pack(self.folder / cache.NAME))
        except OSError as error:
            self.ledger.broke("the cache of kernels", str(error))

    # What is not timed: children side by side

    def smoke(self, until: float) -> None:
        """The checks of :mod:`bench.gpu.smoke`; beside them whatever will be timed compiles, as far as there is time.

        A compilation that fails shows later.
        """
        checks = self._checks() if "smoke" in self.sections else []
        kinds = [kind for kind in ("core", "rivals") if kind in self.sections] or ["core", "rivals"]
        names = {job.name for job in checks}

        def ended(outcome: Outcome) -> None:
            if outcome.job not in names:
                say(f"{WARM_UP}, {outcome.job}: {outcome.seconds:.0f} s")
                return
            say(f"{outcome.job}: {outcome.error or 'passed'}, {outcome.seconds:.0f} s")
            figures = {"error": outcome.error} if outcome.error else outcome.result
            self.ledger.note("smoke", **{outcome.job: figures | {"seconds": outcome.seconds}})
            if outcome.error:
                self.ledger.broke(outcome.job, outcome.error)

        def make(number: int) -> Worker:
            return Worker(WORK, self.scratch / f"together-{number}.log")

        count = min(TOGETHER, max(1, (os.cpu_count() or 1) - 1))
        jobs = [*checks, *compilations(self.contests, kinds)]
        for name in run_together(make, jobs, count, until=until, ended=ended):
            if name in names:
                self.ledger.skip(name, "no time left")

    def _checks(self) -> list[Job]:
        outcome = self.worker.run(Job("the checks", "checks", seconds=30))
        if outcome.error:
            self.ledger.broke("the checks", outcome.error)
            return []
        return [Job(name, "check", {"name": name}, CHECK_SECONDS) for name in outcome.result]

    # What is timed: one child

    def core(self, until: float) -> None:
        """Ours and the eager reference on every row that a target speaks of; see :func:`bench.gpu.work.core`."""
        for one in self.contests:
            if one["target"]:
                self._contest("core", one, until)

    def rivals(self, until: float) -> None:
        """The other contestants of those rows; then, if time is left, the other contests.

        First the contests in which a target speaks of rivals: what there is no time for is worth least.
        """
        for one in sorted(self.contests, key=_worth):
            if not one["target"]:
                self._contest("core", one, until)
            self._contest("rivals", one, until)

    def _contest(self, kind: str, one: dict[str, Any], until: float) -> None:
        name, left = one["name"], self.clock.left(until)
        if left < MINIMUM:
            self.ledger.skip(f"{kind} of {name}", "no time left")
            return
        arguments = {"contest": name, "pass_seconds": PASS_SECONDS}
        limit = one["seconds"]
        if kind == "rivals":  # one that compiles for minutes must leave time for the others
            limit = min(limit, max(MINIMUM, left * SHARES[one["rivals"]]))
        job = Job(name, kind, arguments, left, limit)
        outcome, broken = run_to_the_end(self.worker, job, until=until, on_item=functools.partial(self._item, name))
        say(f"{kind} of {name}: {outcome.seconds:.0f} s{', ' + outcome.error if outcome.error else ''}")
        for contestant, how in broken.items():
            self._lost(f"{name}: {contestant}", how, fault=is_ours(contestant))
        if outcome.error and self.clock.left(until) < 1:
            self.ledger.skip(f"{kind} of {name}", "the time was up while it ran")
        elif outcome.error:
            self.ledger.broke(name, outcome.error)

    def _item(self, contest: str, item: dict[str, Any]) -> None:
        if "row" in item:
            self.ledger.row(item["row"])
        else:
            kind = "failed" if "failed" in item else "left_out"
            self._lost(f"{contest}: {item[kind]}", item["why"], fault=kind == "failed")

    def _lost(self, what: str, how: str, *, fault: bool) -> None:
        """A contestant without a row: a problem if it is ours, else only a row that is missing."""
        self.ledger.note("problems" if fault else "left_out", **{what: how})

    def ceilings(self, until: float) -> None:
        """Measure the machine; see :mod:`bench.gpu.ceilings` and :mod:`bench.gpu.barrier`."""
        for kind, name in [("ceiling", name) for name in CEILINGS] + [("barrier", name) for name in BARRIERS]:
            left = self.clock.left(until)
            if left < MINIMUM / 2:
                self.ledger.skip(f"{kind} {name}", "no time left")
                continue
            outcome = self.worker.run(Job(f"{kind} {name}", kind, {"name": name}, left))
            if outcome.error:
                self.ledger.broke(f"{kind} {name}", outcome.error)
                continue
            self.ledger.note("ceilings", **outcome.result)
            figures = self.ledger.report["ceilings"]
            barriers = [figures[f"barrier_{name}_us"] for name in BARRIERS if f"barrier_{name}_us" in figures]
            if barriers:
                self.ledger.note("ceilings", barrier_us=min(barriers))

    def train(self, until: float) -> None:
        """A part of a real run; see :mod:`bench.gpu.train`. In a new child: one without a CUDA context can fork."""
        self.worker.stop()
        seconds = min(TRAIN_SECONDS, self.clock.left(until) - AFTER_TRAINING)
        job = Job("train", "train", {"seconds": seconds}, self.clock.left(until))
        outcome = self.worker.run(job, lambda item: self.ledger.note("train", **item))
        self.worker.stop()  # with its environments
        if outcome.error:
            self.ledger.broke("train", outcome.error)
        else:
            self.ledger.note("train", **(outcome.result or {}))

    # The tests

    def tests(self, until: float) -> None:
        """See :mod:`bench.gpu.suite`."""
        self.worker.stop()  # its memory
        report, log = self.folder / "tests.jsonl", self.folder / "tests.log"
        left = self.clock.left(until)
        summary = suite.run(report, log, left, progress=lambda part: self.ledger.note("tests", **part))
        self.ledger.note("tests", **summary)
        self._judge("tests", summary)
        if self.sanitize:
            report, log = self.folder / "sanitizer.jsonl", self.folder / "sanitizer.log"
            self.ledger.note("sanitizer", **suite.sanitize(report, log, self.clock.left(until)))
            self._judge("compute-sanitizer", self.ledger.report["sanitizer"])

    def _judge(self, name: str, summary: dict[str, Any]) -> None:
        why = "their time was up" if summary["stopped"] else "pytest ended before them"
        if summary["not_run"]:
            self.ledger.skip(f"{summary['not_run']} of {summary['collected']} {name}", why)
        if name == "tests" and summary["parts"] < len(suite.PARTS):
            self.ledger.skip("tests of other files than test_gpu.py", why)
        if summary["failed"]:
            self.ledger.broke(name, f"{summary['failed']} failed")
        elif summary.get("error"):
            self.ledger.broke(name, summary["error"])
        elif not summary["passed"]:
            self.ledger.broke(name, "none passed")

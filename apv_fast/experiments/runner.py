"""Runs a plan: every step that waits for nothing, as many at a time as the launcher takes, a process each."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

from apv_fast.experiments.plan import Plan, PlanError, Step
from apv_fast.run import StopRequest, stop_on_signal

INTERRUPTED = 130  # exit status of a command that saved its work and stopped because it was asked to
POLL_S = 0.2


class Job(Protocol):
    """A step that was started."""

    id: str
    """A name under which another process finds it, or nothing if none can."""

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""
        ...

    def stop(self) -> None:
        """Ask it to save and end; asked a second time, it ends at once."""
        ...


class Launcher(Protocol):
    """Starts steps."""

    slots: int
    """How many at a time."""

    def start(self, name: str, arguments: Sequence[str], log: Path) -> Job:
        """Run ``apv-fast`` with ``arguments``; what it prints goes to the end of ``log``."""
        ...

    def find(self, job: str) -> Job | None:
        """A job that an earlier process started; None if it cannot be running any more."""
        ...


def step_command(arguments: Sequence[str]) -> list[str]:
    """The process of one step; a run that exists already goes on from its checkpoint."""
    resume = ["--resume"] if arguments[0] in ("pretrain", "finetune") and _began(arguments) else []
    return [sys.executable, "-m", "apv_fast.cli", *arguments, *resume]


def _began(arguments: Sequence[str]) -> bool:
    return (Path(arguments[arguments.index("--out") + 1]) / "config.json").is_file()


def log_file(plan: Plan, step: Step) -> Path:
    """Where the output of a step goes."""
    return plan.out / "logs" / f"{step.name.replace('/', '_')}.log"


@contextmanager
def folder_lock(out: Path) -> Iterator[int]:
    """Be the only one who runs steps in ``out``; gives the lock's file descriptor, for processes to inherit.

    A process that inherited it holds the lock as well: the steps of a killed runner keep a second one out.

    Raises:
        PlanError: somebody else has it.
    """
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out / "lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    except BlockingIOError as error:
        raise PlanError(
            f"{out}: another process runs steps there, or steps of a killed one still run; wait for them or end them"
        ) from error
    finally:
        os.close(descriptor)


class Runner:
    """A plan under way.

    Args:
        plan: it is saved whenever a state changes.
        launcher: what starts the steps.
        interval_s: seconds between lines about the running steps.
        file: where to write lines; default: standard error.
    """

    def __init__(
        self, plan: Plan, launcher: Launcher, *, interval_s: float = 30.0, file: IO[str] | None = None
    ) -> None:
        self._plan, self._launcher, self._interval_s = plan, launcher, interval_s
        self._file = file or sys.stderr
        self._jobs: dict[str, Job] = {}  # by the names of steps
        self._begun: dict[str, float] = {}
        self._stopping = False

    def run(self) -> None:
        """Until no step can run any more, or the user stops it: then the running ones save, and we wait for them."""
        self._find()
        with stop_on_signal() as stop:
            try:
                self._loop(stop)
            except BaseException:
                for job in self._jobs.values():
                    job.stop()
                raise
            finally:
                self._plan.save()

    def _find(self) -> None:
        """Steps that were running when an earlier runner ended: still, or to be run again."""
        for step in self._plan.steps:
            if step.state == "running":
                job = self._launcher.find(step.job) if step.job else None
                if job:
                    self._jobs[step.name], self._begun[step.name] = job, time.monotonic()
                else:
                    step.state, step.job = "waiting", ""

    def _loop(self, stop: StopRequest) -> None:
        shown = time.monotonic()
        while True:
            if stop.requested and not self._stopping:
                self._stopping = True
                for job in self._jobs.values():
                    job.stop()
            for step in self._plan.ready():
                if len(self._jobs) < self._launcher.slots and not self._stopping:
                    self._start(step)
            for name in list(self._jobs):
                self._poll(self._plan[name])
            if not self._jobs and (self._stopping or not self._plan.ready()):
                return
            if time.monotonic() - shown >= self._interval_s:
                shown = time.monotonic()
                for name in self._jobs:
                    self._say(self._plan[name], last_line(log_file(self._plan, self._plan[name])))
            time.sleep(POLL_S)

    def _start(self, step: Step) -> None:
        log = log_file(self._plan, step)
        log.parent.mkdir(parents=True, exist_ok=True)
        job = self._launcher.start(step.name, self._plan.command(step), log)
        self._jobs[step.name], self._begun[step.name] = job, time.monotonic()
        step.state, step.job = "running", job.id
        self._plan.save()
        self._say(step, f"started{f' as {job.id}' if job.id else ''}, output in {log}")

    def _poll(self, step: Step) -> None:
        status = self._jobs[step.name].poll()
        if status is None:
            return
        del self._jobs[step.name]
        asked = status == INTERRUPTED or self._stopping  # a cancelled job of Slurm has no status of its own
        step.state = "done" if status == 0 else "interrupted" if asked else "failed"
        step.job = ""
        self._plan.save()
        minutes = (time.monotonic() - self._begun[step.name]) / 60
        log = log_file(self._plan, step)
        text = f" with status {status}, see {log}: {last_line(log)}" if step.state == "failed" else ""
        self._say(step, f"{step.state} after {minutes:.1f} minutes{text}")

    def _say(self, step: Step, text: str) -> None:
        steps = self._plan.steps
        done = sum(one.state == "done" for one in steps)
        print(f"[{done}/{len(steps)} done] {step.name}: {text}", file=self._file, flush=True)


def last_line(path: Path, size: int = 4096) -> str:
    """The last line of a text file that has something in it, as far as it is in the last ``size`` bytes."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")

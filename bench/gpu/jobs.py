"""Jobs in a process of their own, one after the other, each with a limit of time.

The parent (:class:`Worker`) sends a job, the child (:mod:`bench.gpu.worker`) answers with lines of JSON, and tells what
it finds at once. A child that takes too long is killed, one that dies is noticed; either way the next job gets a new
child. A job that runs several contestants says which one it is at; after a hang or a crash, :func:`run_to_the_end` runs
it again without that one. :func:`run_together` runs jobs side by side.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu.checkout import ROOT, environment

START_SECONDS = 60.0  # to import torch and start CUDA
LOG_LINES = 3  # of a child that died, in the message

OnItem = Callable[[Any], None]  # gets each part of a result as soon as there is one


@dataclass(frozen=True)
class Job:
    """Something that the child can do."""

    name: str  # unique
    kind: str  # which function of the child's module
    arguments: Mapping[str, Any] = field(default_factory=dict)  # what JSON can hold
    seconds: float = 60.0  # the limit
    stage_seconds: float = float("inf")  # the limit of each contestant


@dataclass
class Outcome:
    """What became of a job."""

    job: str
    result: Any = None  # what its function returned
    error: str = ""  # why it returned nothing
    culprit: str = ""  # the contestant that was running when the child hung or died
    finished: list[str] = field(default_factory=list)  # contestants that have told everything
    seconds: float = 0.0


class Worker:
    """A child process, started when the first job comes and again after one that broke it.

    Args:
        module: whose ``run(kind, arguments, tell)`` does the work.
        log: file that the child's output goes to.
    """

    def __init__(self, module: str, log: Path, env: Mapping[str, str] | None = None) -> None:
        self.module, self.log = module, log
        self.env = environment() if env is None else dict(env)
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Kill the child and its children, if there is one."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
        self._process, self._buffer = None, b""

    def run(self, job: Job, on_item: OnItem | None = None) -> Outcome:
        """Do ``job``; never raises for what happens in the child. ``on_item`` gets what it tells meanwhile."""
        start, outcome = time.monotonic(), Outcome(job.name)
        if self._process is None:
            self._start()
            if self._next(min(START_SECONDS, job.seconds)) is None:
                outcome.error = f"the process did not start: {self._last_words()}"
                self.stop()
                return outcome
        self._send({"kind": job.kind, "arguments": job.arguments})
        end, stage_end = start + job.seconds, float("inf")
        while True:
            event = self._next(min(end, stage_end) - time.monotonic())
            if event is None:
                limit = job.seconds if end < stage_end else job.stage_seconds
                late = time.monotonic() >= min(end, stage_end)
                outcome.error = f"took more than {limit:.0f} s" if late else f"the process died: {self._last_words()}"
                self.stop()
                break
            if event["event"] == "stage":
                outcome.culprit, stage_end = event["name"], time.monotonic() + job.stage_seconds
                continue
            if event["event"] == "item":
                if on_item is not None:
                    on_item(event["item"])
                continue
            if event["event"] == "finished":
                outcome.finished.append(event["name"])
                continue
            outcome.result, outcome.error = event.get("result"), event.get("error", "")
            if event.get("fatal"):  # the CUDA context is gone
                self.stop()
            else:
                outcome.culprit = ""
            break
        outcome.seconds = round(time.monotonic() - start, 2)
        return outcome

    def _start(self) -> None:
        command = [sys.executable, "-m", "bench.gpu.worker", self.module]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: reading will notice
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def _next(self, seconds: float) -> dict[str, Any] | None:
        """The child's next event; None if it died or none came in time."""
        assert self._process is not None and self._process.stdout is not None
        pipe, end = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([pipe], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return None
            chunk = os.read(pipe, 1 << 16)
            if not chunk:
                return None
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        event: dict[str, Any] = json.loads(line)
        return event

    def _last_words(self) -> str:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"exit status {self._process.returncode}: {' | '.join(lines[-LOG_LINES:])}"[:600]


def run_to_the_end(
    worker: Worker, job: Job, *, until: float, on_item: OnItem | None = None
) -> tuple[Outcome, dict[str, str]]:
    """Do ``job``; after a hang or a crash do it again without the contestant that was at work, and who had finished.

    Args:
        worker: runs it.
        job: its function must know the argument ``without``, a list of names.
        until: ``time.monotonic()`` after which nothing is begun again.
        on_item: gets the parts of the result, of every try.

    Returns:
        The last outcome, and what happened to the contestants that were left out.
    """
    broken: dict[str, str] = {}
    finished: list[str] = []
    while True:
        limit = min(job.seconds, until - time.monotonic())
        arguments = {**job.arguments, "without": sorted({*job.arguments.get("without", ()), *broken, *finished})}
        outcome = worker.run(Job(job.name, job.kind, arguments, limit, job.stage_seconds), on_item)
        finished += outcome.finished
        again = outcome.culprit and outcome.culprit not in broken and time.monotonic() < until
        if not again:
            return outcome, broken
        broken[outcome.culprit] = outcome.error


def run_together(
    make: Callable[[int], Worker], jobs: Sequence[Job], count: int, *, until: float, ended: Callable[[Outcome], None]
) -> list[str]:
    """Do ``jobs`` in ``count`` children at once, in their order.

    Args:
        make: the worker of a number.
        jobs: what to do.
        count: how many children.
        until: ``time.monotonic()`` at which all must have ended.
        ended: is given each outcome, one at a time.

    Returns:
        The names of jobs for which there was no time.
    """
    waiting, left, lock = list(reversed(jobs)), [], threading.Lock()

    def work(number: int) -> None:
        with make(number) as worker:
            while True:
                with lock:
                    if not waiting:
                        return
                    job = waiting.pop()
                seconds = min(job.seconds, until - time.monotonic())
                outcome = worker.run(Job(job.name, job.kind, job.arguments, seconds)) if seconds > 0 else None
                with lock:
                    if outcome is None:
                        left.append(job.name)
                    else:
                        ended(outcome)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(min(count, len(jobs)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return left

"""Independent pieces of work spread over processes; one that dies is replaced and its piece done again.

Limits: processes are spawned, since one that has rendered must not be forked; each imports the package (about 300 MB).
"""

from __future__ import annotations

import multiprocessing
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from apv_fast.run.interrupt import StopRequest
from apv_fast.worker import begin_worker, interrupt_held

Result = TypeVar("Result")
Worker = Callable[[int], Result]

POLL_S = 0.2  # between looks at whether a stop is requested
ATTEMPTS = 3  # that end in a death without any piece done between, before it is taken for a fault of the work

_worker: Worker[Any]


class GivenUp(Exception):
    """A worker in this process gives its piece up, because a stop is overdue."""


def spread(
    make: Callable[[], Worker[Result]], pieces: Iterable[int], processes: int, stop: StopRequest
) -> Iterator[Result]:
    """What ``make()(piece)`` returns for every piece, in any order; nothing new begins once a stop is requested.

    Args:
        make: picklable; called once in every process.
        pieces: numbers of the pieces.
        processes: how many; one is this process itself.
        stop: asks for an early end; pieces that have begun are finished, as far as that does not take long.

    Raises:
        ChildProcessError: processes die again and again.
    """
    if processes == 1:
        worker = make()
        for piece in pieces:
            if stop.requested:
                return
            try:
                result = worker(piece)
            except GivenUp:
                return
            yield result
        return
    waiting, deaths = deque(pieces), 0
    while waiting and not stop.requested:
        running: dict[Future[Result], int] = {}
        strangers = multiprocessing.active_children()
        context = multiprocessing.get_context("spawn")
        executor = ProcessPoolExecutor(processes, context, initializer=_start, initargs=(make,))
        try:
            while running or (waiting and not stop.requested):
                while waiting and not stop.requested and len(running) < processes:
                    with interrupt_held():
                        running[executor.submit(_do, waiting[0])] = waiting[0]  # a broken pool refuses it: it stays
                    waiting.popleft()
                done, _ = wait(running, POLL_S, FIRST_COMPLETED)
                if not done and stop.overdue:
                    return
                for future in done:
                    result = future.result()
                    del running[future]
                    deaths = 0
                    yield result
            executor.shutdown()
        except BrokenProcessPool as error:
            waiting.extendleft(sorted(running.values(), reverse=True))
            deaths += 1
            if deaths == ATTEMPTS:
                raise ChildProcessError(
                    f"processes died {ATTEMPTS} times over pieces {sorted(running.values())}; if the kernel ended them "
                    "for want of memory (see dmesg), use fewer --processes, else look for a fault of the simulator"
                ) from error
            warnings.warn("a process died; all are started again, and what they had begun is done anew", stacklevel=2)
        finally:
            _end(executor, strangers)


def _start(make: Callable[[], Worker[Any]]) -> None:
    global _worker
    begin_worker()
    _worker = make()


def _do(piece: int) -> Any:
    return _worker(piece)


def _end(executor: ProcessPoolExecutor, strangers: list[Any]) -> None:
    """Kill what is still running; after an orderly end that is nothing.

    The executor's own thread waits for the processes: if two do that, one is told that there is no such child.
    """
    for process in multiprocessing.active_children():
        if process not in strangers:
            process.kill()
    executor.shutdown(cancel_futures=True)

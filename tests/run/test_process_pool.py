"""Work spread over processes."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from apv_fast.run import StopRequest, process_pool
from apv_fast.run.process_pool import spread


def _square() -> Callable[[int], tuple[int, int]]:
    return lambda piece: (piece * piece, os.getpid())


def _dies_once(folder: Path) -> Callable[[int], int]:
    """Piece 1 kills its process the first time."""

    def work(piece: int) -> int:
        mark = folder / "died"
        if piece == 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return piece

    return work


def _dies() -> Callable[[int], int]:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def _sleeps_or_fails() -> Callable[[int], int]:
    def work(piece: int) -> int:
        if piece == 1:
            time.sleep(600)
        return 1 // (piece - 2)

    return work


def test_one_process_is_this_one() -> None:
    assert list(spread(_square, range(3), 1, StopRequest())) == [(n * n, os.getpid()) for n in range(3)]
    stop = StopRequest()
    begun = spread(_square, range(3), 1, stop)
    assert next(begun)[0] == 0
    stop.requested = True
    assert not list(begun)


@pytest.fixture
def none_left() -> Iterator[None]:
    """After the test no process is alive that it began."""
    before = set(multiprocessing.active_children())
    yield
    assert not set(multiprocessing.active_children()) - before


@pytest.mark.usefixtures("none_left")
def test_several_processes(tmp_path: Path) -> None:
    """Every piece is done once, also that of a process that dies; after a request to stop nothing new begins."""
    stop, results, late = StopRequest(), [], 0
    with pytest.warns(UserWarning, match="a process died"):
        for result in spread(partial(_dies_once, tmp_path), range(100_000), 2, stop):
            late += stop.requested
            results.append(result)
            stop.requested = 1 in results
    assert sorted(results) == list(range(len(results)))
    assert late <= 1


def test_a_piece_that_a_broken_pool_refuses_is_done_later(monkeypatch: pytest.MonkeyPatch) -> None:
    submitted = itertools.count()

    class Breaking(ProcessPoolExecutor):
        def submit(self, *args: Any, **kwargs: Any) -> Any:
            if next(submitted) == 2:
                raise BrokenProcessPool
            return super().submit(*args, **kwargs)

    monkeypatch.setattr(process_pool, "ProcessPoolExecutor", Breaking)
    with pytest.warns(UserWarning, match="a process died"):
        done = [square for square, _ in spread(_square, range(5), 2, StopRequest())]
    assert sorted(done) == [n * n for n in range(5)]


@pytest.mark.usefixtures("none_left")
def test_dying_again_and_again_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_pool, "ATTEMPTS", 1)
    with pytest.raises(ChildProcessError, match=r"processes died 1 times over pieces \[0(, 1)?\]"):
        list(spread(_dies, range(2), 2, StopRequest()))


@pytest.mark.usefixtures("none_left")
def test_an_error_in_a_process_is_an_error_here_and_ends_the_others() -> None:
    with pytest.raises(ZeroDivisionError):
        list(spread(_sleeps_or_fails, [0, 1, 2], 2, StopRequest()))

"""A cooperative launch in Triton's interpreter: all programs of a kernel alive at once, on the CPU, in a chosen order.

The stock interpreter runs the programs of a grid one after the other, so a kernel with a grid barrier hangs. Here every
program is a thread, exactly one of which runs at a time: a program gives the turn away at every atomic operation, which
in a kernel of ours means while it arrives at, or waits in, a grid barrier. Who is next is drawn from a seeded
generator, so a run can be repeated and a test can try many orders. The kernel's own barrier runs, not a substitute.

Limits: it interleaves at atomics only and memory is sequentially consistent, so it finds missing and miscounted
barriers, not missing fences.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


class Deadlock(RuntimeError):
    """All programs that are left wait for one that never comes."""


class _Abandoned(BaseException):
    """Unwinds the programs that are left when another one has failed."""


class _Turns:
    """Which program runs; the others sleep, each on a semaphore of its own."""

    def __init__(self, programs: int, seed: int) -> None:
        self.programs = programs
        self.random = random.Random(seed)
        self.semaphores = [threading.Semaphore(0) for _ in range(programs)]
        self.left = list(range(programs))
        self.queue: list[int] = []
        self.idle = 0  # turns given away since a program last arrived or ended
        self.error: BaseException | None = None
        self.local = threading.local()

    def wake_next(self) -> int | None:
        """Choose and wake the next program; every one that is left gets its turn before any gets a second one."""
        self.queue = [i for i in self.queue if i in self.left] or self.random.sample(self.left, len(self.left))
        if not self.queue:
            return None
        chosen = self.queue.pop()
        self.semaphores[chosen].release()
        return chosen

    def give_away(self, progress: bool) -> None:
        """Called by the program that runs: sleep until it is its turn again."""
        self.idle = 0 if progress else self.idle + 1
        if self.idle > 4 * self.programs + 4:
            self.error = Deadlock(f"programs {sorted(self.left)} wait in a barrier that cannot open")
            raise _Abandoned  # which the interpreter does not wrap
        self.wake_next()
        self.semaphores[self.local.program].acquire()
        if self.error is not None:
            raise _Abandoned

    def run(self, program: int, body: Callable[[], None]) -> None:
        """One thread's life."""
        self.local.program = program
        self.semaphores[program].acquire()
        try:
            if self.error is None:
                body()
        except _Abandoned:
            pass
        except BaseException as error:
            self.error = self.error or error
        self.left.remove(program)
        self.idle = 0
        self.wake_next()


@contextlib.contextmanager
def _patched(turns: _Turns) -> Iterator[None]:
    """The interpreter, with program numbers by thread and the turn given away at atomics."""
    builder = interpreter.interpreter_builder
    kind = type(builder)
    atomic, patch_language = kind.create_atomic_rmw, interpreter._patch_lang
    scopes: dict[frozenset[int], Any] = {}

    def create_atomic_rmw(self: Any, operation: Any, pointer: Any, value: Any, *rest: Any) -> Any:
        result = atomic(self, operation, pointer, value, *rest)
        turns.give_away(progress=bool(value.data.any()))  # adding 0 is waiting
        return result

    class Keep:
        """The language stays patched while one program ends and others still run."""

        def restore(self) -> None:
            pass

    def patch_once(function: Any) -> Any:
        modules = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
        if modules not in scopes:
            scopes[modules] = patch_language(function)
        return Keep()

    before = builder.__dict__.pop("grid_idx", None), builder.__dict__.pop("grid_dim", None)
    kind.grid_idx = property(lambda self: (turns.local.program, 0, 0), lambda self, value: None)
    kind.grid_dim = property(lambda self: (turns.programs, 1, 1), lambda self, value: None)
    kind.create_atomic_rmw, interpreter._patch_lang = create_atomic_rmw, patch_once
    try:
        yield
    finally:
        kind.create_atomic_rmw, interpreter._patch_lang = atomic, patch_language
        del kind.grid_idx, kind.grid_dim
        builder.grid_idx, builder.grid_dim = before
        for scope in reversed(scopes.values()):
            scope.restore()


def launch(kernel: Any, programs: int, *args: Any, seed: int = 0, **kwargs: Any) -> None:
    """Run ``kernel`` with ``programs`` programs that may wait for each other.

    Raises:
        Deadlock: they wait for one that has ended.
        Exception: what the first program to fail raised.
    """
    turns = _Turns(programs, seed)

    def body() -> None:
        kernel[(1,)](*args, **kwargs)

    with _patched(turns):
        threads = [threading.Thread(target=turns.run, args=(i, body), daemon=True) for i in range(programs)]
        for thread in threads:
            thread.start()
        turns.wake_next()
        for thread in threads:
            thread.join()
    if turns.error is not None:
        raise turns.error

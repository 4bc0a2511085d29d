"""Environments that step together and give rows as the replay stores them: one here, or N in processes of their own.

The processes are Gymnasium's ``AsyncVectorEnv``. What it lacks: a process that dies (a crash in a driver, no memory
left) is replaced. Environments repeat themselves, so the same start and the same actions lead back to where each of
them was, and nothing is lost; that is also how a resumed run comes back into the middle of its episodes.

Limits: processes are spawned, since one that has rendered must not be forked; each imports the package (about 300 MB).
A crash costs as long as playing the unfinished episodes again.
"""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode

from apv_fast.worker import begin_worker, interrupt_held

Row = dict[str, Any]  # image, action (the one that led here), reward, is_first, is_last, is_terminal, perhaps success
Make = Callable[[], gymnasium.Env[Any, Any]]

ATTEMPTS = 3  # at the same step, before it is taken for a fault of the environment
_DEATH = (EOFError, ConnectionResetError, BrokenPipeError)  # what a pipe says whose other end is gone


class Envs(Protocol):
    """N environments. One whose episode has ended stays at its end until it begins another."""

    count: int
    action_space: gymnasium.Space[Any]  # of one of them

    def begin(self, seeds: Mapping[int, int]) -> dict[int, Row]:
        """Start an episode in each of the environments named, by its seed; their first rows, with zero actions."""

    def step(self, actions: np.ndarray) -> list[Row]:
        """Take a step with ``actions`` ``[N, A]`` in all that have begun; where it led."""

    def recover(self, seeds: Mapping[int, int], actions: Mapping[int, Sequence[np.ndarray]]) -> dict[int, Row]:
        """Start episodes and take ``actions`` in them, one ``[A]`` a step, without telling; where that led."""

    def close(self) -> None:
        """Let go of them."""


def action_size(space: gymnasium.Space[Any]) -> tuple[int, bool]:
    """``(A, discrete)`` of an environment's actions.

    Raises:
        ValueError: they are neither a flat box nor discrete.
    """
    if isinstance(space, gymnasium.spaces.Discrete):
        return int(space.n), True
    if isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1:
        return space.shape[0], False
    raise ValueError(f"the environment's actions are {space}; they must be a flat Box or Discrete")


def environment_action(space: gymnasium.Space[Any], action: np.ndarray) -> Any:
    """What the environment takes for the agent's ``action``."""
    return int(action.argmax()) if isinstance(space, gymnasium.spaces.Discrete) else action


def first_row(env: gymnasium.Env[Any, Any], seed: int) -> Row:
    """Reset the environment; the row of its first image has a zero action."""
    observation, _ = env.reset(seed=seed)
    size, _ = action_size(env.action_space)
    row = {"image": observation["image"], "action": np.zeros(size, np.float32), "reward": np.float32(0)}
    return row | {"is_first": True, "is_last": False, "is_terminal": False}


def next_row(env: gymnasium.Env[Any, Any], action: np.ndarray) -> Row:
    """Take a step; the row of where it led."""
    observation, reward, terminated, truncated, info = env.step(environment_action(env.action_space, action))
    row = {"image": observation["image"], "action": action, "reward": np.float32(reward), "is_first": False}
    row |= {"is_last": bool(terminated or truncated), "is_terminal": bool(terminated)}
    return row | ({"success": np.float32(info["success"])} if "success" in info else {})


class SingleEnv:
    """An environment in this process."""

    count = 1

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        self.env, self.action_space = env, env.action_space
        self._row: Row = {"is_last": True}

    def begin(self, seeds: Mapping[int, int]) -> dict[int, Row]:
        """See :class:`Envs`."""
        self._row = first_row(self.env, seeds[0])
        return {0: self._row}

    def step(self, actions: np.ndarray) -> list[Row]:
        """See :class:`Envs`."""
        if not self._row["is_last"]:
            self._row = next_row(self.env, actions[0])
        return [self._row]

    def recover(self, seeds: Mapping[int, int], actions: Mapping[int, Sequence[np.ndarray]]) -> dict[int, Row]:
        """See :class:`Envs`."""
        rows = self.begin(seeds)
        for action in actions.get(0, ()):
            rows = {0: self.step(np.asarray(action)[None])[0]}
        return rows

    def close(self) -> None:
        """See :class:`Envs`."""
        self.env.close()


class _EnvProcess(gymnasium.Wrapper[Any, Any, Any, Any]):
    """One of several environments, in a process of its own. Each is told what all shall do and does its part."""

    def __init__(self, make: Make, index: int) -> None:
        if multiprocessing.parent_process() is not None:
            begin_worker()
        super().__init__(make())
        self._index, self._single = index, SingleEnv(self.env)

    def begin(self, seeds: Mapping[int, int]) -> Row | None:
        return self._single.begin({0: seeds[self._index]})[0] if self._index in seeds else None

    def act(self, actions: np.ndarray) -> Row:
        return self._single.step(actions[self._index : self._index + 1])[0]

    def recover(self, seeds: Mapping[int, int], actions: Mapping[int, Sequence[np.ndarray]]) -> Row | None:
        if self._index not in seeds:
            return None
        return self._single.recover({0: seeds[self._index]}, {0: actions.get(self._index, ())})[0]


class ParallelEnvs:
    """N environments that ``make`` makes, each in a process of its own; see the head of this file.

    Args:
        make: picklable; called in every process, and once in this one to learn the spaces.
        count: N.
    """

    def __init__(self, make: Make, count: int) -> None:
        if count < 1:
            raise ValueError(f"count is {count}; it must be at least 1")
        self.count = count
        self._make = make
        self._vector = self._start()
        self.action_space = self._vector.single_action_space
        self._seeds: dict[int, int] = {}  # of the episodes that go on, and the actions taken in them
        self._actions: dict[int, list[np.ndarray]] = {}

    def begin(self, seeds: Mapping[int, int]) -> dict[int, Row]:
        """See :class:`Envs`.

        Raises:
            ChildProcessError: a process dies again and again.
        """
        rows = self._call("begin", dict(seeds))
        self._seeds |= seeds
        self._actions |= {index: [] for index in seeds}
        return {index: rows[index] for index in seeds}

    def step(self, actions: np.ndarray) -> list[Row]:
        """See :class:`Envs`; raises as :meth:`begin`."""
        rows = list(self._call("act", actions))
        for index, row in enumerate(rows):
            if index in self._seeds and row["is_last"]:  # nobody will have to come back to it
                del self._seeds[index], self._actions[index]
            elif index in self._seeds:
                self._actions[index].append(actions[index].copy())
        return rows

    def recover(self, seeds: Mapping[int, int], actions: Mapping[int, Sequence[np.ndarray]]) -> dict[int, Row]:
        """See :class:`Envs`; raises as :meth:`begin`."""
        rows = self._call("recover", dict(seeds), dict(actions))
        self._seeds |= seeds
        self._actions |= {index: list(actions.get(index, ())) for index in seeds}
        return {index: rows[index] for index in seeds}

    def close(self) -> None:
        """See :class:`Envs`."""
        try:
            self._vector.close(timeout=5)
        except (*_DEATH, AssertionError):
            self._kill()

    def _start(self) -> AsyncVectorEnv:
        makers = [partial(_EnvProcess, self._make, index) for index in range(self.count)]
        with interrupt_held():
            return AsyncVectorEnv(makers, shared_memory=False, context="spawn", autoreset_mode=AutoresetMode.DISABLED)

    def _call(self, name: str, *arguments: object) -> tuple[Any, ...]:
        """What every environment's ``name`` returns; starts them all again if a process dies over it."""
        for attempt in range(ATTEMPTS):
            if attempt:
                self._restart()
            try:
                return self._vector.call(name, *arguments)
            except _DEATH:
                continue
        self._kill()
        raise ChildProcessError(
            f"an environment's process died {ATTEMPTS} times at the same step; if the kernel ended it for want of "
            "memory (see dmesg), use fewer --envs, else look for a fault of the simulator or its driver"
        )

    def _restart(self) -> None:
        for process in self._vector.processes:
            process.join(timeout=0.2)
        codes = {index: code for index, process in enumerate(self._vector.processes) if (code := process.exitcode)}
        self._kill()
        self._vector = self._start()
        self._vector.call("recover", self._seeds, self._actions)
        dead = ", ".join(f"{index} (exit code {code})" for index, code in codes.items()) or "one of them"
        warnings.warn(
            f"process of environment {dead} died; all {self.count} were started again and are back where they were",
            stacklevel=5,
        )

    def _kill(self) -> None:
        for process in self._vector.processes:
            process.kill()
            process.join()
        self._vector.closed = True  # its own close() would wait for answers

"""Environments side by side: the same episodes as one after the other, also when a process is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from apv_fast import envs
from apv_fast.envs import parallel
from apv_fast.envs.episode import RandomPolicy, evaluate, play
from apv_fast.envs.parallel import ParallelEnvs, Row, SingleEnv

pytest.importorskip("dm_control")

MAKE = partial(envs.make, "dmc:cartpole-swingup", seed=1, size=16, action_repeat=20, time_limit=120, quality="fast")
LENGTH = 6  # actions an episode


class Deadly(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Ends its process at every step, or raises."""

    def __init__(self, kind: str) -> None:
        super().__init__(envs.make("gym:tests.support.corridor:apv/Corridor-v0", seed=1))
        self._kind = kind

    def step(self, action: Any) -> Any:
        if self._kind == "raise":
            raise FloatingPointError("the simulation exploded")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def pair() -> Iterator[ParallelEnvs]:
    two = ParallelEnvs(MAKE, 2)
    yield two
    two.close()


@pytest.fixture(scope="module")
def alone() -> list[list[Row]]:
    """Three episodes, one after the other."""
    env = MAKE()
    episodes = [list(play(env, RandomPolicy(env.action_space, seed), seed)) for seed in (5, 6, 7)]
    env.close()
    return episodes


def actions_at(episodes: list[list[Row]], step: int) -> np.ndarray:
    return np.stack([episode[min(step, len(episode) - 1)]["action"] for episode in episodes])


def same(one: Row, other: Row) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("victims", [(), (1,), (0, 1)], ids=["undisturbed", "one killed", "both killed"])
def test_same_episodes_as_alone(pair: ParallelEnvs, alone: list[list[Row]], victims: tuple[int, ...]) -> None:
    """Environment 1 begins its episode two steps later than environment 0, and then another."""
    first = pair.begin({0: 5})
    assert same(first[0], alone[0][0])
    delayed = [alone[0], [alone[1][0]] * 2 + alone[1]]
    for step in range(1, LENGTH + 1):
        if step == 3:
            assert same(pair.begin({1: 6})[1], alone[1][0])
        if step == 4 and victims:
            for victim in victims:
                pair._vector.processes[victim].kill()
            with pytest.warns(UserWarning, match=rf"environment {victims[0]} \(exit code -9\).* back where they were"):
                rows = pair.step(actions_at(delayed, step))
        else:
            rows = pair.step(actions_at(delayed, step))
        assert same(rows[0], alone[0][step])
        assert step < 3 or same(rows[1], alone[1][step - 2])
    assert rows[0]["is_last"] and not rows[1]["is_last"]
    assert same(pair.begin({0: 7})[0], alone[2][0])
    rows = pair.step(np.stack([alone[2][1]["action"], alone[1][LENGTH - 1]["action"]]))
    assert same(rows[0], alone[2][1]) and same(rows[1], alone[1][LENGTH - 1])


def test_an_ended_episode_stays_at_its_end(pair: ParallelEnvs, alone: list[list[Row]]) -> None:
    one = SingleEnv(MAKE())
    for two in (one, pair):
        row = two.recover({0: 5}, {0: [row["action"] for row in alone[0][1:]]})[0]
        assert same(row, alone[0][-1]) and row["is_last"]
        assert same(two.step(np.zeros((two.count, 1), np.float32))[0], row)
    one.close()


def test_evaluation_has_the_same_starts(pair: ParallelEnvs) -> None:
    """Three episodes in two environments, with actions that do not depend on the order."""

    class Still:
        def __call__(self, image: np.ndarray, is_first: np.ndarray) -> np.ndarray:
            assert image.shape == (len(is_first), 16, 16, 3)
            return np.zeros((len(is_first), 1), np.float32)

    ended: list[int] = []
    one = SingleEnv(MAKE())
    expected = evaluate(one, Still(), 3, seed=2)
    assert evaluate(pair, Still(), 3, seed=2, on_episode=lambda index, rows: ended.append(index)) == expected
    assert sorted(ended) == [0, 1, 2] and len({score["return"] for score in expected}) == 3
    one.close()


def test_a_process_that_dies_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "ATTEMPTS", 2)
    deadly = ParallelEnvs(partial(Deadly, "die"), 1)
    deadly.begin({0: 1})
    with pytest.warns(UserWarning, match="died"), pytest.raises(ChildProcessError, match=r"died 2 times.*fewer --envs"):
        deadly.step(np.zeros((1, 3), np.float32))
    deadly.close()


@pytest.mark.filterwarnings("ignore:.*ERROR")
def test_an_error_in_an_environment_is_not_a_death() -> None:
    raising = ParallelEnvs(partial(Deadly, "raise"), 1)
    raising.begin({0: 1})
    with pytest.raises(FloatingPointError, match="exploded"):
        raising.step(np.zeros((1, 3), np.float32))
    raising.close()


def test_count_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="count is 0"):
        ParallelEnvs(MAKE, 0)

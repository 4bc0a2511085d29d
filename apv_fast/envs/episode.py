"""Playing episodes: a policy in one environment or several, rows as the replay stores them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import gymnasium
import numpy as np

from apv_fast.envs.parallel import Envs, Row, first_row, next_row


class Policy(Protocol):
    """Chooses actions ``[N, A]`` for images ``[N, 64, 64, 3]``; ``is_first`` ``[N]`` bool starts an episode."""

    def __call__(self, image: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        """The actions."""
        ...


class RandomPolicy:
    """Uniform actions."""

    def __init__(self, action_space: gymnasium.Space[Any], seed: int) -> None:
        self._space, self.generator = action_space, np.random.default_rng(seed)

    def __call__(self, image: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        """Random actions."""
        return np.stack([self.draw() for _ in is_first])

    def draw(self) -> np.ndarray:
        """A random action ``[A]``."""
        if isinstance(self._space, gymnasium.spaces.Discrete):
            return np.eye(int(self._space.n), dtype=np.float32)[self.generator.integers(self._space.n)]
        assert isinstance(self._space, gymnasium.spaces.Box)
        return self.generator.uniform(self._space.low, self._space.high).astype(np.float32)


def choose(policy: Policy, rows: Sequence[Row]) -> np.ndarray:
    """The policy's actions ``[N, A]`` where N environments are."""
    return policy(np.stack([row["image"] for row in rows]), np.array([row["is_first"] for row in rows]))


def play(env: gymnasium.Env[Any, Any], policy: Policy, seed: int) -> Iterator[Row]:
    """The rows of one episode."""
    row = first_row(env, seed)
    yield row
    while not row["is_last"]:
        row = next_row(env, choose(policy, [row])[0])
        yield row


def episode_seed(seed: int, purpose: str, index: int) -> int:
    """The seed of one episode of a run: another one for every index and purpose ("train", "eval", ...)."""
    entropy = [seed, index, *purpose.encode()]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def episode_scores(rows: list[Row]) -> dict[str, float]:
    """Return, length in agent steps and, where the environment reports it, success at any step."""
    scores = {"return": float(sum(row["reward"] for row in rows)), "length": float(len(rows) - 1)}
    if "success" in rows[-1]:
        scores["success"] = float(max(row.get("success", 0.0) for row in rows))
    return scores


def evaluate(
    envs: Envs,
    policy: Policy,
    episodes: int,
    seed: int,
    on_episode: Callable[[int, list[Row]], None] = lambda index, rows: None,
) -> list[dict[str, float]]:
    """Scores of ``episodes`` episodes; the same starts every time for the same ``seed``, however many environments.

    ``on_episode`` gets an episode's index and rows when it ends.
    """
    scores: dict[int, dict[str, float]] = {}
    left = deque(range(episodes))
    played: dict[int, tuple[int, list[Row]]] = {}  # by environment: index and rows of its episode
    while left or played:
        free = [i for i in range(envs.count) if i not in played]
        begun = {i: left.popleft() for i in free[: len(left)]}
        if begun:
            first = envs.begin({i: episode_seed(seed, "eval", index) for i, index in begun.items()})
            played |= {i: (index, [first[i]]) for i, index in begun.items()}
        anyone = next(iter(played.values()))  # the policy has a row for an environment that plays no more, too
        now = [played.get(i, anyone)[1][-1] for i in range(envs.count)]
        for i, row in enumerate(envs.step(choose(policy, now))):
            if i in played:
                index, rows = played[i]
                rows.append(row)
                if row["is_last"]:
                    on_episode(index, rows)
                    scores[index] = episode_scores(rows)
                    del played[i]
    return [scores[index] for index in range(episodes)]


def summarize(scores: list[dict[str, float]], prefix: str) -> dict[str, float]:
    """Means of every score under ``prefix_name``, and the standard deviation of the return."""
    summary = {f"{prefix}_{name}": float(np.mean([score[name] for score in scores])) for name in scores[0]}
    return summary | {f"{prefix}_return_std": float(np.std([score["return"] for score in scores]))}

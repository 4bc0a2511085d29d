"""Playing episodes: a policy in one environment or several, rows as the replay stores them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch

from apv_fast.agent.agent import Agent, Memory
from apv_fast.agent.worlds import Row, Worlds, first_row, next_row


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


class AgentPolicy:
    """An agent in N environments, with its memory of them."""

    def __init__(self, agent: Agent, *, explore: bool, generator: torch.Generator | None = None) -> None:
        self.agent, self.explore, self.generator = agent, explore, generator
        self.memory: Memory | None = None

    def __call__(self, image: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        """The agent's actions; remembers the step."""
        device = self.agent.device
        action, self.memory = self.agent.act(
            torch.from_numpy(image).to(device),
            torch.from_numpy(is_first).to(device),
            self.memory,
            explore=self.explore,
            generator=self.generator,
        )
        result: np.ndarray = action.float().cpu().numpy()
        return result


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
    worlds: Worlds,
    policy: Policy,
    episodes: int,
    seed: int,
    on_episode: Callable[[int, list[Row]], None] = lambda index, rows: None,
) -> list[dict[str, float]]:
    """Scores of ``episodes`` episodes; the same starts every time for the same ``seed``, however many worlds there are.

    ``on_episode`` gets an episode's index and rows when it ends.
    """
    scores: dict[int, dict[str, float]] = {}
    left = deque(range(episodes))
    played: dict[int, tuple[int, list[Row]]] = {}  # by world: index and rows of its episode
    while left or played:
        free = [world for world in range(worlds.count) if world not in played]
        begun = {world: left.popleft() for world in free[: len(left)]}
        if begun:
            first = worlds.begin({world: episode_seed(seed, "eval", index) for world, index in begun.items()})
            played |= {world: (index, [first[world]]) for world, index in begun.items()}
        anyone = next(iter(played.values()))  # the policy has a row for a world that plays no more, too
        now = [played.get(world, anyone)[1][-1] for world in range(worlds.count)]
        for world, row in enumerate(worlds.step(choose(policy, now))):
            if world in played:
                index, rows = played[world]
                rows.append(row)
                if row["is_last"]:
                    on_episode(index, rows)
                    scores[index] = episode_scores(rows)
                    del played[world]
    return [scores[index] for index in range(episodes)]


def summarize(scores: list[dict[str, float]], prefix: str) -> dict[str, float]:
    """Means of every score under ``prefix_name``, and the standard deviation of the return."""
    summary = {f"{prefix}_{name}": float(np.mean([score[name] for score in scores])) for name in scores[0]}
    return summary | {f"{prefix}_return_std": float(np.std([score["return"] for score in scores]))}

"""Playing episodes: one environment, one policy, rows as the replay stores them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch

from apv_fast.agent.agent import Agent, Memory

Row = dict[str, Any]  # image, action (the one that led here), reward, is_first, is_last, is_terminal


class Policy(Protocol):
    """Chooses an action ``[A]`` for an image ``[64, 64, 3]``; ``is_first`` starts an episode."""

    def __call__(self, image: np.ndarray, is_first: bool) -> np.ndarray:
        """The action."""
        ...


class RandomPolicy:
    """Uniform actions."""

    def __init__(self, action_space: gymnasium.Space[Any], seed: int) -> None:
        self._space, self.generator = action_space, np.random.default_rng(seed)

    def __call__(self, image: np.ndarray, is_first: bool) -> np.ndarray:
        """A random action."""
        if isinstance(self._space, gymnasium.spaces.Discrete):
            return np.eye(int(self._space.n), dtype=np.float32)[self.generator.integers(self._space.n)]
        assert isinstance(self._space, gymnasium.spaces.Box)
        return self.generator.uniform(self._space.low, self._space.high).astype(np.float32)


class AgentPolicy:
    """An agent in one environment, with its memory."""

    def __init__(self, agent: Agent, *, explore: bool, generator: torch.Generator | None = None) -> None:
        self.agent, self.explore, self.generator = agent, explore, generator
        self.memory: Memory | None = None

    def __call__(self, image: np.ndarray, is_first: bool) -> np.ndarray:
        """The agent's action; remembers the step."""
        device = self.agent.device
        action, self.memory = self.agent.act(
            torch.from_numpy(image)[None].to(device),
            torch.tensor([is_first], device=device),
            self.memory,
            explore=self.explore,
            generator=self.generator,
        )
        result: np.ndarray = action[0].float().cpu().numpy()
        return result


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
    row |= {"is_last": terminated or truncated, "is_terminal": terminated}
    return row | ({"success": np.float32(info["success"])} if "success" in info else {})


def play(env: gymnasium.Env[Any, Any], policy: Policy, seed: int) -> Iterator[Row]:
    """The rows of one episode."""
    row = first_row(env, seed)
    yield row
    while not row["is_last"]:
        row = next_row(env, policy(row["image"], row["is_first"]))
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
    env: gymnasium.Env[Any, Any],
    policy: Policy,
    episodes: int,
    seed: int,
    on_episode: Callable[[int, list[Row]], None] = lambda index, rows: None,
) -> list[dict[str, float]]:
    """Scores of ``episodes`` episodes; the same starts every time for the same ``seed``."""
    scores = []
    for index in range(episodes):
        rows = list(play(env, policy, episode_seed(seed, "eval", index)))
        on_episode(index, rows)
        scores.append(episode_scores(rows))
    return scores


def summarize(scores: list[dict[str, float]], prefix: str) -> dict[str, float]:
    """Means of every score under ``prefix_name``, and the standard deviation of the return."""
    summary = {f"{prefix}_{name}": float(np.mean([score[name] for score in scores])) for name in scores[0]}
    return summary | {f"{prefix}_return_std": float(np.std([score["return"] for score in scores]))}

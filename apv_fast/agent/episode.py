"""Playing episodes: a policy in one environment or several, rows as the replay stores them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch
from torch import Tensor

from apv_fast.agent.acting import Acting, Memory
from apv_fast.agent.agent import Agent
from apv_fast.agent.cuda_graph import GraphedUpdate, Recorder
from apv_fast.agent.world_model import Batch
from apv_fast.config import Graph
from apv_fast.envs.parallel import Row, Worlds, first_row, next_row


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
    """An agent in N environments, with its memory of them; on a GPU each step can be one CUDA graph.

    Args:
        agent: who acts.
        explore: sample the actor, else take its mode.
        generator: of all random choices; None: torch's default.
        acting: weights to act with; None: the agent's own, as they are at each step.
        graph: record a step and replay it, see :class:`GraphedUpdate`. A generator's seed may change between steps.
        stream: of the GPU to run in, beside what its current one does; None: the current one.
        recorder: None takes CUDA graphs.
    """

    def __init__(
        self,
        agent: Agent,
        *,
        explore: bool,
        generator: torch.Generator | None = None,
        acting: Acting | None = None,
        graph: Graph = "off",
        stream: torch.cuda.Stream | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.acting, self.explore, self.generator = acting or agent.acting, explore, generator
        self.memory: Memory | None = None  # its tensors stay, since a recorded step writes into them
        self.stream = stream
        self.run = GraphedUpdate(
            self._step, self._changed, agent.device, graph, recorder, what="acting step", generator=generator
        )

    def __call__(self, image: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        """The agent's actions; remembers the step."""
        with torch.cuda.stream(self.stream):
            if self.memory is None:
                self.memory = self.acting.initial(len(image))
            made = self.run({"image": torch.from_numpy(image), "is_first": torch.from_numpy(is_first)})
            result: np.ndarray = made["action"].float().cpu().numpy()
        return result

    def remember(self, memory: Memory | None) -> None:
        """Go on from a memory that was saved."""
        self.memory = memory
        self.run.forget()

    @torch.no_grad()
    def forget(self) -> None:
        """Begin as if there had been no step."""
        if self.memory is not None:
            for tensor in self.memory.tensors():
                tensor.zero_()

    def _step(self, batch: Batch) -> dict[str, Tensor]:
        """On the device, from images to actions."""
        assert self.memory is not None
        action, memory = self.acting(
            batch["image"], batch["is_first"], self.memory, explore=self.explore, generator=self.generator
        )
        for place, value in zip(self._changed(), memory.tensors(), strict=True):
            place.copy_(value)
        return {"action": action}

    def _changed(self) -> list[Tensor]:
        return [] if self.memory is None else list(self.memory.tensors())


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

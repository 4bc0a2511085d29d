"""Playing the episodes of a data set: one environment, one policy, the videos of all cameras."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apv_fast.agent import Agent
from apv_fast.agent.agent_policy import AgentPolicy
from apv_fast.commands.parts.device import computing
from apv_fast.commands.parts.environments import camera_id, make_env
from apv_fast.commands.parts.training_run import load_agent
from apv_fast.config import CollectConfig, ConfigError, to_dict, user_settings
from apv_fast.data.episodes import Episode, stack_transitions
from apv_fast.envs.episode import Policy, RandomPolicy, episode_scores, episode_seed, play
from apv_fast.envs.parallel import Row, action_size
from apv_fast.run import StopRequest
from apv_fast.run.process_pool import GivenUp


@dataclass
class CollectedEpisode:
    """One episode."""

    index: int
    videos: dict[str, np.ndarray]  # view -> uint8 [T, size, size, 3]
    rows: Episode  # everything else, [T, ...]
    scores: dict[str, float]


class EpisodeCollector:
    """Plays the episodes of a data set, any of them in any order; each is the same in whatever process.

    One thread computes, so that the number of cores does not show in the last bits of an action.

    Attributes:
        stop: asks for an early end.

    Raises:
        ConfigError: the environment, the policy and the cameras do not go together.
    """

    def __init__(self, config: CollectConfig) -> None:
        self.config, self.stop = config, StopRequest()
        trained = config.policy not in ("random", "scripted")
        # What is seen while playing: it matters to a trained policy only, so else it is one of the views.
        seen = config.world.camera if trained or not config.cameras else config.cameras[0]
        self._seen = seen
        with ExitStack() as stack:
            self._device = stack.enter_context(computing(config.seed, config.device, config.backend))
            stack.enter_context(one_thread())
            world = dataclasses.replace(config.world, camera=seen)
            self.env = stack.enter_context(closing(make_env(config.env, world, config.seed)))
            self.fps = float(self.env.metadata["render_fps"])
            self._agent = self._load() if trained else None
            if config.policy == "scripted" and not hasattr(self.env.unwrapped, "expert_action"):
                raise ConfigError(f"policy is 'scripted', but {config.env} has no scripted expert; metaworld: has them")
            self._stack = stack.pop_all()

    def look(self) -> int:
        """See through every camera once; returns the height of a frame.

        Raises:
            ConfigError: there is no such camera.
        """
        observation, _ = self.env.reset(seed=0)
        with user_settings():
            self._look(observation["image"])
        return len(observation["image"])

    def __call__(self, index: int) -> CollectedEpisode:
        """Play episode ``index``.

        Raises:
            GivenUp: a stop was requested, and it takes too long.
        """
        seed = episode_seed(self.config.seed, "collect", index)
        rows: list[Row] = []
        views: dict[str, list[np.ndarray]] = {}
        for row in play(self.env, self._policy(seed), seed):
            if self.stop.overdue:
                raise GivenUp
            for name, image in self._look(row["image"]).items():
                views.setdefault(name, []).append(image)
            rows.append({key: value for key, value in row.items() if key != "image"})
        videos = {name: np.stack(frames) for name, frames in views.items()}
        scores = episode_scores(rows) | {"frames": float(len(rows))}
        return CollectedEpisode(index, videos, stack_transitions(rows), scores)

    def close(self) -> None:
        """Let go of the environment, and of the settings that computing had here."""
        self._stack.close()

    def _look(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """This moment in every view; ``image`` is what the policy sees."""
        if not self.config.cameras:
            return {view_name(self.config, None): image}
        env: Any = self.env.unwrapped
        return {
            view_name(self.config, camera): image if camera == self._seen else env.render_camera(camera_id(camera))
            for camera in self.config.cameras
        }

    def _load(self) -> Agent:
        config = self.config
        agent, trained, _ = load_agent(Path(config.policy), self._device)
        size, _ = action_size(self.env.action_space)
        if size != (trained_size := agent.model.rssm.action_dim):
            raise ConfigError(
                f"policy: {config.policy} was trained in {trained.env} with {trained_size} actions, "
                f"but {config.env} takes {size}"
            )
        before, now = to_dict(trained.world), to_dict(config.world)
        for name in before:
            if before[name] != now[name]:
                warnings.warn(
                    f"the policy was trained with world.{name} {before[name]!r}, not {now[name]!r}", stacklevel=2
                )
        return agent

    def _policy(self, seed: int) -> Policy:
        if self._agent is not None:
            generator = torch.Generator(self._device).manual_seed(seed)
            return AgentPolicy(self._agent, explore=True, generator=generator)
        if self.config.policy == "scripted":
            return lambda image, is_first: self.env.unwrapped.expert_action()[None]  # type: ignore[attr-defined]
        return RandomPolicy(self.env.action_space, seed)


def view_name(config: CollectConfig, camera: str | None) -> str:
    """What a view is called in files; None is the only one, where no cameras are named."""
    name = config.world.camera if camera is None else camera
    return "default" if name is None else name.replace("/", "_")


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes with one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

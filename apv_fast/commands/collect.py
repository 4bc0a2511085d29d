"""``apv-fast collect``: render episodes of an environment into a folder of videos."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium
import torch

from apv_fast.agent import Agent
from apv_fast.agent.episode import (
    AgentPolicy,
    Policy,
    RandomPolicy,
    episode_scores,
    episode_seed,
    play,
)
from apv_fast.agent.worlds import action_size
from apv_fast.commands.common import computing, make_env
from apv_fast.commands.evaluate import load_agent
from apv_fast.config import CollectConfig, ConfigError, to_dict
from apv_fast.data import atomic_file, write_episode
from apv_fast.data.atomic import TEMPORARY_SUFFIX
from apv_fast.data.episodes import stack_transitions
from apv_fast.run import Progress, stop_on_signal

# What a folder's episodes have in common; with another value they would not belong together.
_IDENTITY = ("env", "policy", "world", "seed")


def collect(config: CollectConfig) -> Path:
    """Write episodes until there are ``config.episodes``; returns the folder with them.

    The i-th episode is the same whenever it is made, so an interrupted collection goes on where it stopped.

    Raises:
        KeyboardInterrupt: the user stopped it; finished episodes are there.
    """
    folder = config.out / "train_episodes"
    with (
        computing(config.seed, config.device, config.backend) as device,
        closing(make_env(config.env, config.world, config.seed)) as env,
    ):
        agent = None if config.policy == "random" else _load_policy(config, env, device)
        _describe(config)
        folder.mkdir(exist_ok=True)
        done = index = len(list(folder.glob("*.npz")))
        with stop_on_signal() as stop, Progress("collect", config.episodes, start=done, unit="episode") as progress:
            while index < config.episodes and not stop.requested:
                seed = episode_seed(config.seed, "collect", index)
                rows = list(play(env, _policy(agent, env, seed, device), seed))
                write_episode(folder, stack_transitions(rows))
                index += 1
                progress.update(index, f"return {episode_scores(rows)['return']:.1f}")
    if index < config.episodes:
        raise KeyboardInterrupt(f"stopped at {index} of {config.episodes} episodes; the same command goes on")
    return folder


def _load_policy(config: CollectConfig, env: gymnasium.Env[Any, Any], device: torch.device) -> Agent:
    agent, trained, _ = load_agent(Path(config.policy), device)
    size, _ = action_size(env.action_space)
    trained_size = agent.model.rssm.action_dim
    if size != trained_size:
        raise ConfigError(
            f"policy: {config.policy} was trained in {trained.env} with {trained_size} actions, "
            f"but {config.env} takes {size}"
        )
    return agent


def _policy(agent: Agent | None, env: gymnasium.Env[Any, Any], seed: int, device: torch.device) -> Policy:
    if agent is None:
        return RandomPolicy(env.action_space, seed)
    return AgentPolicy(agent, explore=True, generator=torch.Generator(device).manual_seed(seed))


def _describe(config: CollectConfig) -> None:
    """Record how the videos were made beside them; refuse to mix them with others."""
    path, values = config.out / "dataset.json", to_dict(config)
    values = {name: values[name] for name in _IDENTITY}
    if path.exists():
        before = json.loads(path.read_text())
        for name in _IDENTITY:
            if before.get(name) != values[name]:
                raise ConfigError(
                    f"{path}: {name} is {before.get(name)!r} there and {values[name]!r} now; choose another --out"
                )
        return
    if config.out.exists() and any(not one.name.endswith(TEMPORARY_SUFFIX) for one in config.out.iterdir()):
        raise ConfigError(f"out: {config.out} is not empty and was not made by apv-fast collect; choose another --out")
    config.out.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write((json.dumps(values, indent=2) + "\n").encode())

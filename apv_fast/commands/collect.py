"""``apv-fast collect``: render episodes of an environment into a folder of videos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium
import torch

from apv_fast.agent.episode import AgentPolicy, Policy, RandomPolicy, episode_scores, episode_seed, play
from apv_fast.commands.common import computing, make_env
from apv_fast.commands.evaluate import load_agent
from apv_fast.config import CollectConfig, ConfigError, to_dict
from apv_fast.data import atomic_file, write_episode
from apv_fast.data.episodes import stack_transitions
from apv_fast.run import Progress, stop_on_signal

# What a folder's episodes have in common; with another value they would not belong together.
_IDENTITY = ("env", "policy", "world", "seed")


def collect(config: CollectConfig) -> Path:
    """Write episodes until there are ``config.episodes``; returns the folder with them.

    The i-th episode is the same whenever it is made, so an interrupted collection goes on where it stopped.
    """
    folder = config.out / "train_episodes"
    _describe(config)
    with computing(config.seed, config.device, config.backend) as device:
        env = make_env(config.env, config.world, config.seed)
        folder.mkdir(parents=True, exist_ok=True)
        done = len(list(folder.glob("*.npz")))
        with stop_on_signal() as stop, Progress("collect", config.episodes, start=done, unit="episode") as progress:
            for index in range(done, config.episodes):
                seed = episode_seed(config.seed, "collect", index)
                rows = list(play(env, _policy(config, env, seed, device), seed))
                write_episode(folder, stack_transitions(rows))
                progress.update(index + 1, f"return {episode_scores(rows)['return']:.1f}")
                if stop.requested:
                    break
        env.close()
    return folder


def _policy(config: CollectConfig, env: gymnasium.Env[Any, Any], seed: int, device: torch.device) -> Policy:
    if config.policy == "random":
        return RandomPolicy(env.action_space, seed)
    agent = load_agent(Path(config.policy), device)[0]
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
    config.out.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write((json.dumps(values, indent=2) + "\n").encode())

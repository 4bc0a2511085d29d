"""``apv-fast evaluate``: scores of a trained policy, beside those of random actions."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

import torch

from apv_fast.agent import Agent
from apv_fast.agent.episode import AgentPolicy, Policy, RandomPolicy, evaluate, summarize
from apv_fast.commands.common import checkpoint_of, computing, make_env, make_worlds
from apv_fast.config import ConfigError, EvaluateConfig, FinetuneConfig, from_dict
from apv_fast.data import atomic_file
from apv_fast.envs.parallel import action_size
from apv_fast.run import Progress, RunDirectory, RunError


def load_agent(path: Path, device: torch.device) -> tuple[Agent, FinetuneConfig, int]:
    """Agent, configuration and step of the newest checkpoint of a fine-tuning run.

    Raises:
        RunError: ``path`` is no such run, or has no checkpoint.
    """
    run = RunDirectory.open(path)
    values = run.config()
    if "env" not in values:
        raise RunError(f"{path} is a pre-training run; this needs one of apv-fast finetune")
    config = from_dict(FinetuneConfig, values, run.config_file)
    env = make_env(config.env, config.world, config.seed)
    size, discrete = action_size(env.action_space)
    env.close()
    source, step, state = checkpoint_of(run, device)
    agent = Agent(config, size, discrete=discrete, device=device)
    agent.restore(state["agent"], source)
    return agent, config, step


def evaluate_run(config: EvaluateConfig) -> dict[str, float]:
    """Play ``config.episodes`` with the policy and as many with random actions; print and save the scores."""
    for name, value in (("episodes", config.episodes), ("envs", config.envs)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    with computing(config.seed, config.device, config.backend) as device:
        agent, trained, step = load_agent(config.run, device)
        policies: dict[str, Policy] = {"eval": AgentPolicy(agent, explore=False)}
        worlds = make_worlds(trained.env, trained.world, config.seed, min(config.envs, config.episodes))
        policies["random"] = RandomPolicy(worlds.action_space, config.seed)
        result = {"step": float(step), "episodes": float(config.episodes)}
        with Progress("evaluate", config.episodes * len(policies), unit="episode") as progress:
            for number, (prefix, policy) in enumerate(policies.items()):
                done = count(number * config.episodes + 1)
                scores = evaluate(
                    worlds,
                    policy,
                    config.episodes,
                    config.seed,
                    lambda index, rows, done=done: progress.update(next(done)),  # type: ignore[misc]
                )
                result |= summarize(scores, prefix)
        worlds.close()
    with atomic_file(config.run / "evaluation.json") as file:
        file.write((json.dumps(result, indent=2) + "\n").encode())
    for prefix, label in (("eval", "policy"), ("random", "random")):
        mean, spread = result[f"{prefix}_return"], result[f"{prefix}_return_std"]
        success = f", success {result[f'{prefix}_success']:.0%}" if f"{prefix}_success" in result else ""
        print(f"{label}: return {mean:.1f} ± {spread:.1f} over {config.episodes} episodes{success}")
    return result

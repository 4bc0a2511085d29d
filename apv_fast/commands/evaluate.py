"""``apv-fast evaluate``: scores of a trained policy, beside those of random actions."""

from __future__ import annotations

import json
from itertools import count

from apv_fast.agent.agent_policy import AgentPolicy
from apv_fast.atomic_file import atomic_file
from apv_fast.commands.parts.device import computing
from apv_fast.commands.parts.environments import make_envs
from apv_fast.commands.parts.training_run import load_agent
from apv_fast.config import ConfigError, EvaluateConfig
from apv_fast.envs.episode import Policy, RandomPolicy, evaluate, summarize
from apv_fast.run import Progress


def evaluate_run(config: EvaluateConfig) -> dict[str, float]:
    """Play ``config.episodes`` with the policy and as many with random actions; print and save the scores."""
    for name, value in (("episodes", config.episodes), ("envs", config.envs)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    with computing(config.seed, config.device, config.backend) as device:
        agent, trained, step = load_agent(config.run, device)
        policies: dict[str, Policy] = {"eval": AgentPolicy(agent, explore=False)}
        envs = make_envs(trained.env, trained.world, config.seed, min(config.envs, config.episodes))
        policies["random"] = RandomPolicy(envs.action_space, config.seed)
        result = {"step": float(step), "episodes": float(config.episodes)}
        with Progress("evaluate", config.episodes * len(policies), unit="episode") as progress:
            for number, (prefix, policy) in enumerate(policies.items()):
                done = count(number * config.episodes + 1)
                scores = evaluate(
                    envs,
                    policy,
                    config.episodes,
                    config.seed,
                    lambda index, rows, done=done: progress.update(next(done)),  # type: ignore[misc]
                )
                result |= summarize(scores, prefix)
        envs.close()
    with atomic_file(config.run / "evaluation.json") as file:
        file.write((json.dumps(result, indent=2) + "\n").encode())
    for prefix, label in (("eval", "policy"), ("random", "random")):
        mean, spread = result[f"{prefix}_return"], result[f"{prefix}_return_std"]
        success = f", success {result[f'{prefix}_success']:.0%}" if f"{prefix}_success" in result else ""
        print(f"{label}: return {mean:.1f} ± {spread:.1f} over {config.episodes} episodes{success}")
    return result

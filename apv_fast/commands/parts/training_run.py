"""A training run's beginning and end: its directory, what is said of it, and what its newest checkpoint holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from apv_fast.agent import Agent, Pretrainer
from apv_fast.agent.world_model import PRECISIONS
from apv_fast.backend import requested
from apv_fast.commands.parts.backend_report import op_backends, triton_scan
from apv_fast.commands.parts.environments import make_env
from apv_fast.config import FinetuneConfig, PretrainConfig, from_dict, to_dict
from apv_fast.envs.parallel import action_size
from apv_fast.run import RunDirectory, RunError, load_latest

# What may differ when a run is resumed; everything else decides what is learnt.
MAY_CHANGE = (
    *("resume", "out", "steps", "device", "backend", "log_every", "video_every", "checkpoint_every"),
    *("eval_every", "eval_episodes", "graph", "conv_search", "replay_device", "validate_every", "prefetch", "cache"),
)


def begin(config: PretrainConfig | FinetuneConfig, learner: Pretrainer | Agent, what: str) -> RunDirectory:
    """The run directory of a new run, or of the one that is resumed; says what will be done and on which backends.

    Call it when all else that can be wrong has been checked: a new run's directory cannot be used for another.

    Raises:
        RunError: the directory has something in it, or, to resume, no run or one of other settings.
        BackendError: the backend cannot run what ``learner`` needs.
    """
    model = learner.model
    device = next(model.parameters()).device
    sizes = {name: getattr(config.model, name) for name in ("deter", "hidden", "stoch", "discrete")}
    sizes["batch"] = config.batch
    precision = PRECISIONS[config.model.precision]
    backends = op_backends(needed_ops(config), device, config.backend, precision, sizes) + triton_scan(device)
    values = to_dict(config)
    if config.resume:
        run = RunDirectory.open(config.out, writer=True)
        run.check_config(values, may_change=MAY_CHANGE)
    else:
        run = RunDirectory.create(config.out, values)
    weights = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"{what}, batches of {config.batch} × {config.length} steps, {weights:.3g} million weights, "
        f"on {device}, backend {requested(config.backend)}, into {run.path}",
        file=sys.stderr,
    )
    print(f"updates: {learner.run.description}", *backends, sep="\n", file=sys.stderr)
    return run


def needed_ops(config: PretrainConfig | FinetuneConfig) -> list[str]:
    """The ops of one run."""
    ops = ["normalize_image", "rssm_observe", "rssm_imagine", "image_loss", "keras_adam"]
    ops.append("kl_balance" if config.model.discrete else "kl_balance_normal")
    if isinstance(config, FinetuneConfig):
        ops += ["rssm_rollout", "rssm_step", "lambda_return"]
        ops += ["stacked_observe"] * config.stacked + ["video_bonus"] * config.bonus
    return ops


def going_on(step: int, total: int) -> None:
    """Say where a resumed run stands."""
    print(f"going on at {step} of {total}" if step < total else f"all {total} are done already", file=sys.stderr)


def stopped(run: RunDirectory, command: str, done: int, total: int) -> KeyboardInterrupt:
    """What to raise when a run was interrupted and has saved what it did."""
    return KeyboardInterrupt(f"stopped at {done} of {total}; go on with: apv-fast {command} --resume --out {run.path}")


def checkpoint_of(run: RunDirectory, device: torch.device) -> tuple[Any, int, dict[str, Any]]:
    """File, step and state of the newest checkpoint of a run that must have one.

    Raises:
        RunError: it has none.
    """
    checkpoint = load_latest(run.checkpoints, map_location=device)
    if checkpoint is None:
        raise RunError(f"{run.path} has no checkpoint yet; let its run go on with --resume until it has written one")
    return checkpoint


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

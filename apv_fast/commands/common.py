"""What the commands share: device and seed, a run's beginning and end, its environment, means of metrics."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import gymnasium
import torch
from torch import Tensor

from apv_fast import envs
from apv_fast.agent import Agent, Pretrainer
from apv_fast.agent.world_model import PRECISIONS, Batch, Metrics
from apv_fast.backend import BackendError, probe, requested, use_backend
from apv_fast.commands.backend_report import op_paths, scan_path
from apv_fast.config import ConfigError, FinetuneConfig, PretrainConfig, WorldConfig, to_dict
from apv_fast.cpu import ISA_VARIABLE
from apv_fast.cpu.memory import keep_freed_memory
from apv_fast.data import DeviceRows
from apv_fast.envs.parallel import OneWorld, ParallelWorlds, Worlds
from apv_fast.run import RunDirectory, RunError, load_latest

# What may differ when a run is resumed; everything else decides what is learnt.
MAY_CHANGE = (
    *("resume", "out", "steps", "device", "backend", "log_every", "video_every", "checkpoint_every"),
    *("eval_every", "eval_episodes", "graph", "conv_search", "replay_device", "validate_every", "prefetch", "cache"),
)


def pick_device(name: str) -> torch.device:
    """The device that a command computes on.

    Raises:
        ConfigError: a GPU was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch sees no CUDA device; use --device cpu, or see apv-fast info")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


@contextmanager
def computing(seed: int, device: str, backend: str) -> Iterator[torch.device]:
    """Seed torch, select the backend, and give the device."""
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed is {seed}; it must be in [0, 2**32)")
    torch.manual_seed(seed)
    with use_backend(requested(backend)):
        chosen = pick_device(device)
        if chosen.type == "cpu":
            if os.environ.get(ISA_VARIABLE) and not probe("cpu").available:  # who names one is not to get another
                raise BackendError(probe("cpu").reason)
            keep_freed_memory()
        yield chosen


@contextmanager
def user_settings() -> Iterator[None]:
    """Inside, a plain ValueError is about what the user chose; it becomes a ConfigError, which has no traceback."""
    try:
        yield
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        raise ConfigError(str(error)) from error


def replay_place(config: PretrainConfig | FinetuneConfig, device: torch.device) -> dict[str, Any]:
    """Arguments of the replay that say where its batches come from.

    Raises:
        ConfigError: the device's memory was asked for and the device is the CPU.
    """
    on_gpu = device.type == "cuda"
    if config.replay_device == "device" and not on_gpu:
        raise ConfigError(
            f"replay_device is 'device', but the device is {device.type}, where frames are on the host anyway; "
            "use --replay-device auto or host"
        )
    if config.replay_device == "host" or not on_gpu:
        return {"pin_memory": on_gpu}
    return {"pin_memory": on_gpu, "rows": DeviceRows(device, strict=config.replay_device == "device")}


def begin(config: PretrainConfig | FinetuneConfig, learner: Pretrainer | Agent, what: str) -> RunDirectory:
    """The run directory of a new run, or of the one that is resumed; says what will be done and on which path.

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
    paths = op_paths(needed_ops(config), device, config.backend, precision, sizes) + scan_path(device)
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
    print(f"updates: {learner.run.description}", *paths, sep="\n", file=sys.stderr)
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
    found = load_latest(run.checkpoints, map_location=device)
    if found is None:
        raise RunError(f"{run.path} has no checkpoint yet; let its run go on with --resume until it has written one")
    return found


def make_worlds(env_id: str, world: WorldConfig, seed: int, count: int = 1) -> Worlds:
    """``count`` of the environment, side by side; one alone is played in this process."""
    if count == 1:
        return OneWorld(make_env(env_id, world, seed))
    return ParallelWorlds(partial(make_env, env_id, world, seed), count)


def camera_id(name: str) -> str | int:
    """A camera as environments take it: its number, if it is named by that."""
    return int(name) if name.removeprefix("-").isdigit() else name


def make_env(env_id: str, world: WorldConfig, seed: int) -> gymnasium.Env[Any, Any]:
    """The environment as configured."""
    with user_settings():
        return envs.make(
            env_id,
            seed=seed,
            action_repeat=world.action_repeat,
            time_limit=world.time_limit,
            camera=None if world.camera is None else camera_id(world.camera),
            quality=world.quality,
        )


def to_device(batch: dict[str, Tensor], device: torch.device) -> Batch:
    """The batch on the device."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


class MeanMetrics:
    """Means since they were last taken; nothing is fetched from a GPU before."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None  # float64 [number of names]
        self._count = 0

    def add(self, metrics: Metrics) -> None:
        """Count the metrics of one update: always the same ones. They are copied, so they may be overwritten."""
        values = torch.stack(list(metrics.values())).double()
        self._names, self._sums = (
            tuple(metrics),
            values if self._sums is None else values + self._sums.to(values.device),
        )
        self._count += 1

    def take(self) -> dict[str, float]:
        """The means, and start anew; empty if nothing was added."""
        sums = [] if self._sums is None else self._sums.tolist()
        means = {name: value / self._count for name, value in zip(self._names, sums, strict=True)}
        self._names, self._sums, self._count = (), None, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        """What was added since."""
        sums = {} if self._sums is None else dict(zip(self._names, self._sums.unbind(), strict=True))
        return {"sums": sums, "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put it back."""
        self._names, self._count = tuple(state["sums"]), state["count"]
        self._sums = torch.stack(list(state["sums"].values())) if state["sums"] else None

"""What the commands share: device and seed, a run's beginning, its environment, means of metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium
import torch
from torch import Tensor

from apv_fast import envs
from apv_fast.agent.world_model import Batch, Metrics
from apv_fast.backend import use_backend
from apv_fast.config import ConfigError, FinetuneConfig, PretrainConfig, WorldConfig, check, to_dict
from apv_fast.run import RunDirectory, RunError, load_latest

# What may differ when a run is resumed; everything else decides what is learnt.
MAY_CHANGE = (
    *("resume", "out", "steps", "device", "backend", "log_every", "video_every", "checkpoint_every"),
    *("eval_every", "eval_episodes"),
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
    torch.manual_seed(seed)
    with use_backend(backend):
        yield pick_device(device)


def begin(config: PretrainConfig | FinetuneConfig) -> RunDirectory:
    """The run directory of a new run, or of the one that is resumed."""
    check(config)
    values = to_dict(config)
    if not config.resume:
        return RunDirectory.create(config.out, values)
    run = RunDirectory.open(config.out, writer=True)
    run.check_config(values, may_change=MAY_CHANGE)
    return run


def checkpoint_of(run: RunDirectory, device: torch.device) -> tuple[Any, int, dict[str, Any]]:
    """File, step and state of the newest checkpoint of a run that must have one.

    Raises:
        RunError: it has none.
    """
    found = load_latest(run.checkpoints, map_location=device)
    if found is None:
        raise RunError(f"{run.path} has no checkpoint yet; let its run go on with --resume until it has written one")
    return found


def make_env(env_id: str, world: WorldConfig, seed: int) -> gymnasium.Env[Any, Any]:
    """The environment as configured."""
    camera = int(world.camera) if world.camera is not None and world.camera.isdigit() else world.camera
    return envs.make(
        env_id,
        seed=seed,
        action_repeat=world.action_repeat,
        time_limit=world.time_limit,
        camera=camera,
        quality=world.quality,
    )


def to_device(batch: dict[str, Tensor], device: torch.device) -> Batch:
    """The batch on the device."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


class MeanMetrics:
    """Means since they were last taken; nothing is fetched from a GPU before."""

    def __init__(self) -> None:
        self._sums: Metrics = {}
        self._count = 0

    def add(self, metrics: Metrics) -> None:
        """Count the metrics of one update."""
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.double()
        self._count += 1

    def take(self) -> dict[str, float]:
        """The means, and start anew; empty if nothing was added."""
        means = {name: float(value) / self._count for name, value in self._sums.items()}
        self._sums, self._count = {}, 0
        return means

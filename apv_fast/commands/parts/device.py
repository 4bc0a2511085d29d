"""Where a command computes: device, seed, backend, and where its batches come from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from apv_fast.agent.world_model import Batch
from apv_fast.backend import BackendError, probe, requested, use_backend
from apv_fast.config import ConfigError, FinetuneConfig, PretrainConfig
from apv_fast.cpu import ISA_VARIABLE
from apv_fast.cpu.memory import keep_freed_memory
from apv_fast.data import DeviceRows


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


def to_device(batch: dict[str, Tensor], device: torch.device) -> Batch:
    """The batch on the device."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}

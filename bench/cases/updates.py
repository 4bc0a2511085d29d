"""Whole training updates as the commands make them: losses, gradients, optimiser steps; no environment, no loading.

Everything that the shape does not name is the Meta-world preset: stacked, with the bonus, 32 x 32 latents.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from apv_fast.agent.agent import Agent, Pretrainer
from apv_fast.config import PRESETS, Backend, FinetuneConfig, Graph, ModelConfig, PretrainConfig
from bench.registry import EAGER_FP32, FORWARD_BACKWARD, REFERENCE, Problem, case

ACTIONS = 4
DTYPES = (torch.float32, torch.bfloat16)  # of the products
FULL = {"deter": 1024, "hidden": 1024, "cnn_depth": 48}
SMALL = {"deter": 200, "hidden": 200, "cnn_depth": 16}
SEQUENCES = {"B": 16, "T": 25}
PAPER = {"B": 50, "T": 50}
HORIZON = {"horizon": 15}
MODEL_OPS = ("rssm_observe", "kl_balance")
TASK_OPS = ("stacked_observe", "rssm_rollout", "kl_balance", "knn_bonus", "lambda_return")


def _model(dtype: torch.dtype, deter: int, hidden: int, cnn_depth: int) -> ModelConfig:
    precision: Literal["fp32", "bf16"] = "bf16" if dtype == torch.bfloat16 else "fp32"
    return ModelConfig(deter=deter, hidden=hidden, cnn_depth=cnn_depth, precision=precision)


def _videos(device: torch.device, B: int, T: int) -> dict[str, Tensor]:
    is_first = torch.zeros(B, T, dtype=torch.bool, device=device)
    is_first[:, 0] = True
    return {"image": torch.randint(256, (B, T, 64, 64, 3), dtype=torch.uint8, device=device), "is_first": is_first}


def pretrain_setup(
    device: torch.device, dtype: torch.dtype, B: int, T: int, **sizes: int
) -> tuple[dict[str, Tensor], PretrainConfig]:
    """A batch and the configuration that fits it."""
    config = replace(PRESETS["metaworld"].pretrain, batch=B, length=T, model=_model(dtype, **sizes))
    return _videos(device, B, T), config


def finetune_setup(
    device: torch.device, dtype: torch.dtype, B: int, T: int, horizon: int, **sizes: int
) -> tuple[dict[str, Tensor], FinetuneConfig]:
    """A batch and the configuration that fits it."""
    batch = _videos(device, B, T) | {
        "action": torch.rand(B, T, ACTIONS, device=device) * 2 - 1,
        "reward": torch.rand(B, T, device=device),
        "is_terminal": torch.zeros(B, T, dtype=torch.bool, device=device),
    }
    preset = PRESETS["metaworld"].finetune
    behavior = replace(preset.behavior, horizon=horizon)
    return batch, replace(preset, batch=B, length=T, model=_model(dtype, **sizes), behavior=behavior)


def _graph(backend: str) -> Graph:
    """The reference is plain PyTorch, eager; everything else runs as in production."""
    return "off" if backend == REFERENCE else "auto"


def _whole(make: Callable[[Backend], Callable[[], object]]) -> Problem:
    """A problem from a function that makes a learner; each contestant trains one of its own."""
    learner = functools.cache(make)
    return Problem({FORWARD_BACKWARD: lambda name: learner(name)()})


@case("pretrain_update", [SEQUENCES | FULL], dtypes=DTYPES, uses=MODEL_OPS, wider=(EAGER_FP32,))
@case("pretrain_update", [SEQUENCES | SMALL], uses=MODEL_OPS)
@case("pretrain_update", [PAPER | FULL], dtypes=DTYPES, uses=MODEL_OPS, slow=True)
def pretrain_update(device: torch.device, dtype: torch.dtype, **shape: int) -> Problem:
    """One update of the action-free video model."""
    batch, config = pretrain_setup(device, dtype, **shape)

    def make(backend: Backend) -> Callable[[], object]:
        learner = Pretrainer(replace(config, backend=backend, graph=_graph(backend)), device)
        return functools.partial(learner.update, batch)

    return _whole(make)


@case("finetune_update", [SEQUENCES | FULL | HORIZON], dtypes=DTYPES, uses=TASK_OPS, wider=(EAGER_FP32,))
@case("finetune_update", [SEQUENCES | SMALL | HORIZON], dtypes=DTYPES, uses=TASK_OPS, wider=(EAGER_FP32,))
@case("finetune_update", [PAPER | FULL | HORIZON], dtypes=DTYPES, uses=TASK_OPS, slow=True)
def finetune_update(device: torch.device, dtype: torch.dtype, **shape: int) -> Problem:
    """One update of world model, actor and critic."""
    batch, config = finetune_setup(device, dtype, **shape)

    def make(backend: Backend) -> Callable[[], object]:
        agent = Agent(replace(config, backend=backend, graph=_graph(backend)), ACTIONS, discrete=False, device=device)
        return functools.partial(agent.update, batch)

    return _whole(make)

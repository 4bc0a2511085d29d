"""Whole training updates as the commands make them: losses, gradients, optimiser steps; no environment, no loading.

Everything that the shape does not name is the Meta-world preset: stacked, with the bonus, 32 x 32 latents. "auto" is
the way of production, the best backend of every op; on a GPU one CUDA graph an update.
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
from bench.gpu.contests import COMPILED_GRAPH, REFERENCE_GRAPH
from bench.gpu.targets import WITHOUT_GRAPH
from bench.registry import (
    BF16,
    COLD,
    COMPILED,
    FORWARD_BACKWARD,
    FP32,
    REFERENCE,
    TF32,
    WIDER,
    OnDevice,
    Other,
    Passes,
    Problem,
    case,
)
from bench.rivals.compiled import compile_update

ACTIONS = 4
DTYPES = (FP32, BF16)  # of the products
FULL = {"deter": 1024, "hidden": 1024, "cnn_depth": 48}
SMALL = {"deter": 200, "hidden": 200, "cnn_depth": 16}
SEQUENCES = {"B": 16, "T": 25}
PAPER = {"B": 50, "T": 50}
HORIZON = {"horizon": 15}
MODEL_OPS = ("rssm_observe", "kl_balance")
TASK_OPS = ("stacked_observe", "rssm_rollout", "kl_balance", "knn_bonus", "lambda_return")
AUTO = "auto"
# How bench.device runs each: backend and graph.
WAYS: dict[str, tuple[Backend, Graph]] = {
    AUTO: ("auto", "on"),
    WITHOUT_GRAPH: ("auto", "off"),
    REFERENCE: ("reference", "off"),
    REFERENCE_GRAPH: ("reference", "on"),
}
COMPILED_WAY: tuple[Backend, Graph] = ("reference", "on")

Make = Callable[[Backend, Graph, bool], Callable[[], object]]  # backend, graph, whether compiled -> does an update


@case("pretrain_update", [SEQUENCES | FULL], dtypes=DTYPES, uses=MODEL_OPS, wider=WIDER)
@case("pretrain_update", [SEQUENCES | SMALL], uses=MODEL_OPS)
@case("pretrain_update", [PAPER | FULL], dtypes=DTYPES, uses=MODEL_OPS, slow=True)
def pretrain_update(device: torch.device, dtype: torch.dtype, **shape: int) -> Problem:
    """One update of the action-free video model."""
    return _problem(_pretrainer(device, dtype, shape))


@case("finetune_update", [SEQUENCES | FULL | HORIZON], dtypes=DTYPES, uses=TASK_OPS, wider=WIDER)
@case("finetune_update", [SEQUENCES | SMALL | HORIZON], dtypes=DTYPES, uses=TASK_OPS, wider=WIDER)
@case("finetune_update", [PAPER | FULL | HORIZON], dtypes=DTYPES, uses=TASK_OPS, slow=True)
def finetune_update(device: torch.device, dtype: torch.dtype, **shape: int) -> Problem:
    """One update of world model, actor and critic."""
    return _problem(_agent(device, dtype, shape))


PRETRAIN_ON_DEVICE, FINETUNE_ON_DEVICE = OnDevice(150, (COLD,)), OnDevice(300, (COLD,))


@case(
    "pretrain_update", [SEQUENCES | FULL], dtypes=(BF16, TF32), uses=MODEL_OPS, bench=False, device=PRETRAIN_ON_DEVICE
)
def pretrain_on_device(device: torch.device, dtype: torch.dtype, **shape: int) -> Problem:
    """The video model's update in the ways of a GPU."""
    return _device_problem(_pretrainer(device, dtype, shape))


@case(
    "finetune_update", [PAPER | FULL | HORIZON], dtypes=(BF16,), uses=TASK_OPS, bench=False, device=FINETUNE_ON_DEVICE
)
def finetune_on_device(device: torch.device, dtype: torch.dtype, **shape: int) -> Problem:
    """The Meta-world update: world model, 2500 starts × 15 imagined steps, actor and critic."""
    return _device_problem(_agent(device, dtype, shape))


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


def _pretrainer(device: torch.device, dtype: torch.dtype, shape: dict[str, int]) -> Make:
    batch, config = pretrain_setup(device, dtype, **shape)

    def make(backend: Backend, graph: Graph, compiles: bool) -> Callable[[], object]:
        learner = Pretrainer(replace(config, backend=backend, graph=graph), device)
        if compiles:
            compile_update(learner)
        return functools.partial(learner.update, batch)

    return make


def _agent(device: torch.device, dtype: torch.dtype, shape: dict[str, int]) -> Make:
    batch, config = finetune_setup(device, dtype, **shape)

    def make(backend: Backend, graph: Graph, compiles: bool) -> Callable[[], object]:
        agent = Agent(replace(config, backend=backend, graph=graph), ACTIONS, discrete=False, device=device)
        if compiles:
            compile_update(agent)
        return functools.partial(agent.update, batch)

    return make


def _problem(make: Make) -> Problem:
    """Each contestant trains a learner of its own; the reference is plain PyTorch, all else runs as in production."""

    @functools.cache
    def learner(backend: Backend) -> Callable[[], object]:
        return make(backend, "off" if backend == REFERENCE else "auto", False)

    def run(name: Backend) -> object:
        return learner(name)()

    def compiled() -> Passes:
        return {FORWARD_BACKWARD: make("reference", "off", True)}

    return Problem({FORWARD_BACKWARD: run}, {COMPILED: Other(compiled, slow=True)})  # type: ignore[dict-item]


def _device_problem(make: Make) -> Problem:
    """The same in the ways of ``bench.device``; learners record themselves."""

    @functools.cache
    def learner(name: str) -> Callable[[], object]:
        return make(*WAYS[name], False)

    def run(name: str) -> object:
        return learner(name)()

    def prepare(way: tuple[Backend, Graph], compiles: bool) -> Passes:
        return {FORWARD_BACKWARD: make(*way, compiles)}

    ways = {name: (way, False) for name, way in WAYS.items() if name not in (AUTO, REFERENCE)}
    ways[COMPILED_GRAPH] = (COMPILED_WAY, True)
    others = {name: Other(functools.partial(prepare, *way), graph=False) for name, way in ways.items()}
    return Problem({FORWARD_BACKWARD: run}, others, graph=False)

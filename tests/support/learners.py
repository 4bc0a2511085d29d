"""Learners at toy sizes, batches for them, and where two of their states differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apv_fast.agent import Agent, Pretrainer
from apv_fast.config import (
    BehaviorConfig,
    FinetuneConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    VideoBonusConfig,
    WorldConfig,
)

CPU, FILE = torch.device("cpu"), Path("run/step-1.pt")

MODEL = ModelConfig(deter=6, hidden=5, stoch=3, discrete=4, action_pad=4, cnn_depth=1)

PRETRAIN = PretrainConfig((), Path(), model=MODEL)

FINETUNE = FinetuneConfig(
    "none",
    Path(),
    model=MODEL,
    video_bonus=VideoBonusConfig(queue_size=9, projection_dim=4, k=3, window=2),
    behavior=BehaviorConfig(horizon=3, layers=2, units=7, slow_every=3, optimizer=OptimizerConfig(lr=1e-3)),
)

PLAIN = replace(FINETUNE, stacked=False, bonus=False)

VARIANTS = {
    "stacked": FINETUNE,
    "plain": PLAIN,
    "discount": replace(FINETUNE, discount_head=True, discount_grad=True, af_kl_scale=0.3, concat_embed=True),
    "gaussian": replace(FINETUNE, model=replace(MODEL, discrete=0)),
    "bf16": replace(FINETUNE, model=replace(MODEL, precision="bf16")),
}


def make_batch(seed: int = 0, *, batch: int = 2, length: int = 4, actions: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, length)
    is_first = torch.zeros(shape, dtype=torch.bool)
    is_first[:, 0] = True
    is_terminal = torch.zeros(shape, dtype=torch.bool)
    is_terminal[0, -1] = True
    return {
        "image": torch.randint(256, (*shape, 64, 64, 3), generator=generator, dtype=torch.uint8),
        "action": torch.rand(*shape, actions, generator=generator) * 2 - 1,
        "reward": torch.randn(shape, generator=generator),
        "is_first": is_first,
        "is_last": is_terminal,
        "is_terminal": is_terminal,
    }


def make_agent(config: FinetuneConfig = FINETUNE, *, discrete: bool = False, seed: int = 0) -> Agent:
    torch.manual_seed(seed)
    return Agent(config, 2, discrete=discrete, device=CPU)


def make(kind: str) -> Pretrainer | Agent:
    if kind != "video":
        return make_agent(VARIANTS[kind])
    torch.manual_seed(0)
    return Pretrainer(PRETRAIN, CPU)


def tensors(state: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries and lists, by path."""
    if isinstance(state, Mapping):
        items = list(state.items())
    elif isinstance(state, list):
        items = list(enumerate(state))
    else:
        return {prefix: state}
    return {path: leaf for key, value in items for path, leaf in tensors(value, f"{prefix}.{key}").items()}


def differing(a: Any, b: Any) -> list[str]:
    """Paths at which two states are not the same bit for bit."""
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    same = {k: torch.equal(x, right[k]) if isinstance(x, Tensor) else x == right[k] for k, x in left.items()}
    return [path for path, equal in same.items() if not equal]


CORRIDOR = FinetuneConfig(
    "gym:tests.support.corridor:apv/Continuous-v0",
    Path(),
    model=MODEL,
    world=WorldConfig(),
    video_bonus=FINETUNE.video_bonus,
    behavior=FINETUNE.behavior,
    batch=2,
    length=4,
    steps=60,
    prefill=10,
    first_updates=3,
    train_every=5,
    log_every=20,
    eval_every=1000,
    eval_episodes=1,
    video_every=1000,
    checkpoint_every=1000,
    device="cpu",
    overlap=True,
)

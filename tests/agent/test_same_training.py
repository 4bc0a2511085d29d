"""Training on the CPU engine is training on the reference: same seed, same samples, same losses.

Until rounding decides a sample: at full size one of some thousand samples an update lies so close that a sum in another
order flips it, and from there two runs are two runs. The reference on one thread parts from itself on two like that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from apv_fast.agent import Agent, Pretrainer
from apv_fast.backend import probe, use_backend
from apv_fast.config import PRESETS, Backend, BehaviorConfig, ModelConfig

if not probe("cpu").available:
    pytest.skip(f"cpu: {probe('cpu').reason}", allow_module_level=True)

TINY = ModelConfig(deter=48, hidden=40, stoch=6, discrete=5, cnn_depth=4)
FULL = ModelConfig()
LOSSES = ("kl_loss", "image_loss", "reward_loss", "af_kl_loss", "actor_loss", "critic_loss")
CPU = torch.device("cpu")


def batches(count: int, size: int, length: int) -> list[dict[str, Tensor]]:
    """Frames with something to learn: a bright square that moves with the action."""
    generator = torch.Generator().manual_seed(0)
    data = []
    for _ in range(count):
        action = torch.rand(size, length, 4, generator=generator) * 2 - 1
        at = (24 + 4 * action[..., 0].cumsum(1)).clamp(0, 48).long()
        image = torch.full((size, length, 64, 64, 3), 40, dtype=torch.uint8)
        for b in range(size):
            for t in range(length):
                image[b, t, 24:40, at[b, t] : at[b, t] + 16] = 220
        is_first = torch.zeros(size, length, dtype=torch.bool)
        is_first[:, 0] = True
        data.append({"image": image, "action": action, "reward": at / 48.0, "is_first": is_first})
        data[-1]["is_terminal"] = torch.zeros_like(is_first)
    return data


def pretraining(
    model: ModelConfig, size: int, length: int, backend: Backend = "auto"
) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    config = replace(PRESETS["small"].pretrain, model=model, batch=size, length=length, backend=backend, graph="off")
    return Pretrainer(config, CPU).update


def finetuning(
    model: ModelConfig, size: int, length: int, backend: Backend = "auto"
) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    behavior = BehaviorConfig() if model is FULL else BehaviorConfig(units=32, horizon=5)
    config = replace(
        PRESETS["small"].finetune,
        model=model,
        batch=size,
        length=length,
        behavior=behavior,
        backend=backend,
        graph="off",
    )
    return Agent(config, 4, discrete=False, device=CPU).update


def losses(make: Callable[..., Callable], backend: str, model: ModelConfig, data: list[dict[str, Tensor]]) -> Tensor:  # type: ignore[type-arg]
    """``[updates, losses]`` from seed 0."""
    torch.manual_seed(0)
    size, length = data[0]["is_first"].shape
    with use_backend(backend):
        update = make(model, size, length)
        rows = [{key: x.clone() for key, x in update(batch).items()} for batch in data]
    return torch.tensor([[float(row[name]) for name in LOSSES if name in row] for row in rows])


@pytest.mark.thorough
@pytest.mark.parametrize("make", [pretraining, finetuning])
@pytest.mark.parametrize(
    ("model", "updates", "size", "length"),
    [(TINY, 50, 3, 7), pytest.param(FULL, 12, 8, 16, marks=pytest.mark.slow)],
    ids=["tiny", "full"],
)
def test_same_losses(make: Callable, model: ModelConfig, updates: int, size: int, length: int) -> None:  # type: ignore[type-arg]
    data = batches(updates, size, length)
    ours, reference = losses(make, "auto", model, data), losses(make, "reference", model, data)
    assert all(not torch.equal(a, b) for a, b in pairwise(reference)), "it trains"
    # Relative to the size of each loss over the run: an actor's loss crosses zero.
    apart = (ours - reference).abs() / reference.abs().amax(0)
    assert apart.max() <= 1e-3, apart.amax(0)


@pytest.mark.parametrize("make", [pretraining, finetuning])
def test_a_named_backend_binds_every_layer(make: Callable) -> None:  # type: ignore[type-arg]
    """Not only where ``use_backend`` is in force: a model that is told runs what it is told."""

    def engines(backend: str) -> set[str]:
        (batch,) = batches(1, 3, 7)
        update = make(TINY, 3, 7, backend=backend)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            update(batch)
        return {event.name for event in profiler.events() or () if event.name.endswith("_cpu")}

    assert engines("reference") == set()
    assert {"apv_fast::image_encoder_cpu", "apv_fast::kl_balance_cpu"} <= engines("auto")

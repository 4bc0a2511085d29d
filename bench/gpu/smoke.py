"""Whether it works at all: checks of a minute together, before anything is timed. Each returns figures or raises.

They run side by side in processes of their own, so that one that hangs or breaks the device costs itself only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from apv_fast.agent.agent import Pretrainer
from apv_fast.config import Graph
from bench.cases.updates import FULL, SEQUENCES, pretrain_setup
from bench.gpu import barrier

ROUNDS, FAULTY_ROUNDS = 100_000, 20_000
UPDATES = 100
LENGTH = 50
Figures = dict[str, Any]


class Learner(Protocol):
    """A model in training."""

    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One update; its metrics, good until the next."""
        ...

    def tensors(self) -> Any:
        """All that an update changes."""
        ...


def orders(kind: str) -> Figures:
    """A grid barrier orders what programs write and read, and each planted wrong order is noticed.

    Raises:
        AssertionError: it does not, or it is not.
    """
    wrong = barrier.stress(kind, ROUNDS)
    noticed = {fault: barrier.stress(kind, FAULTY_ROUNDS, fault) for fault in barrier.FAULTS}
    if wrong or not all(noticed.values()):
        raise AssertionError(f"{wrong} reads of a wrong round in {ROUNDS} rounds; with a fault planted: {noticed}")
    return {"rounds": ROUNDS, "wrong reads": wrong, "with a fault": noticed}


def observe(backend: str, batch: int) -> Figures:
    """Fifty steps of filtering at full size in bfloat16, values and gradients, against float64 under the shared rule.

    Raises:
        AssertionError: an error is over twice that of PyTorch in bfloat16.
        RuntimeError: the backend cannot run here.
    """
    from apv_fast.backend import probe
    from tests.support.rssm_cases import full
    from tests.support.rssm_errors import assert_exact

    if not probe(backend).available:
        raise RuntimeError(probe(backend).reason)
    assert_exact("observe", backend, full(batch, LENGTH), torch.bfloat16, True)
    return {"within": "twice PyTorch's error against float64"}


def replayed(make: Callable[[Graph], Learner], batch: dict[str, Tensor], updates: int = UPDATES) -> Figures:
    """A learner's updates as replays of one graph and as they are: the same losses and weights to the bit.

    Raises:
        AssertionError: they differ.
    """
    losses: list[Tensor] = []
    tensors: list[list[Tensor]] = []
    for graph in ("on", "off"):
        torch.manual_seed(1)
        learner = make(graph)
        losses.append(torch.stack([learner.update(batch)["loss"].clone() for _ in range(updates)]))
        tensors.append([tensor.detach().clone() for tensor in learner.tensors()])
        del learner
    differ = (losses[0] != losses[1]).nonzero().flatten()
    far = max(float((a.double() - b.double()).abs().max()) for a, b in zip(*tensors, strict=True) if a.numel())
    if len(differ) or far or not bool(losses[0].isfinite().all()):
        first = int(differ[0]) + 1 if len(differ) else "none"
        raise AssertionError(f"first update with another loss: {first}; the state differs by {far:.3g} at most")
    return {"updates": updates, "first loss": float(losses[0][0]), "last loss": float(losses[0][-1])}


def update() -> Figures:
    """See :func:`replayed`: of pre-training at full size in bfloat16, with algorithms of cuDNN that repeat."""
    device = torch.device("cuda")
    torch.backends.cudnn.deterministic = True
    batch, config = pretrain_setup(device, torch.bfloat16, **SEQUENCES, **FULL)
    return replayed(lambda graph: Pretrainer(replace(config, backend="auto", graph=graph), device), batch)


CHECKS: dict[str, Callable[[], Figures]] = {
    **{f"barrier {kind}": functools.partial(orders, kind) for kind in barrier.KINDS},
    "pre-training update, replayed": update,
    **{
        f"observe {backend} B={batch}": functools.partial(observe, backend, batch)
        for backend in ("cuda", "triton")
        for batch in (16, 50)
    },
}

"""Contests of whole training updates: one graph an update against PyTorch, eager and recorded.

"auto" is the production path: the best backend of every op, in a CUDA graph. Batches are on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

from apv_fast.agent.agent import Agent, Pretrainer
from apv_fast.config import Backend, Graph
from bench.cases.updates import ACTIONS, finetune_setup, pretrain_setup
from bench.gpu.contests import DEVICE, REFERENCE_GRAPH, Contest, Passes, Players, contest
from bench.registry import FORWARD_BACKWARD, REFERENCE

AUTO, AUTO_EAGER = "auto", "auto, without a graph"
FULL = {"deter": 1024, "hidden": 1024, "cnn_depth": 48}
Make = Callable[[Backend, Graph], Callable[[], object]]  # backend and graph -> one update
WAYS: dict[str, tuple[Backend, Graph]] = {
    AUTO: ("auto", "on"),
    AUTO_EAGER: ("auto", "off"),
    REFERENCE: ("reference", "off"),
    REFERENCE_GRAPH: ("reference", "on"),
}


def _players(make: Make) -> Players:
    def prepare(backend: Backend, graph: Graph) -> Passes:
        return {FORWARD_BACKWARD: make(backend, graph)}

    return {name: functools.partial(prepare, *way) for name, way in WAYS.items()}


@contest("pretrain_update", [{"B": 16, "T": 25, **FULL}], ("bfloat16", "tf32"), seconds=60)
def pretrain_update(contest: Contest) -> Players:
    """The video model's update."""
    batch, config = pretrain_setup(DEVICE, contest.torch_dtype, **contest.shape)

    def make(backend: Backend, graph: Graph) -> Callable[[], object]:
        learner = Pretrainer(replace(config, backend=backend, graph=graph), DEVICE)
        return functools.partial(learner.update, batch)

    return _players(make)


@contest("finetune_update", [{"B": 50, "T": 50, **FULL, "horizon": 15}], ("bfloat16",), seconds=120)
def finetune_update(contest: Contest) -> Players:
    """The Meta-world update: world model, 2500 starts × 15 imagined steps, actor and critic."""
    batch, config = finetune_setup(DEVICE, contest.torch_dtype, **contest.shape)

    def make(backend: Backend, graph: Graph) -> Callable[[], object]:
        agent = Agent(replace(config, backend=backend, graph=graph), ACTIONS, discrete=False, device=DEVICE)
        return functools.partial(agent.update, batch)

    return _players(make)

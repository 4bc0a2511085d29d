"""Contests of whole training updates: one graph an update against PyTorch, eager, recorded and compiled, and peers.

"auto" is the production path: the best backend of every op, in a CUDA graph. Batches are on the device. Other projects'
updates run in processes of their own (:mod:`bench.peers.remote`) where an environment variable names their checkout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from apv_fast.agent.agent import Agent, Pretrainer
from apv_fast.config import Backend, Graph
from bench.cases.updates import ACTIONS, finetune_setup, pretrain_setup
from bench.rivals.compiled import compile_update
from bench.gpu.contests import (
    COMPILED_GRAPH,
    DEVICE,
    REFERENCE_GRAPH,
    Contest,
    Passes,
    Players,
    Prepare,
    Stated,
    contest,
)
from bench.peers import remote
from bench.registry import FORWARD_BACKWARD, REFERENCE

AUTO, AUTO_EAGER = "auto", "auto, without a graph"
FULL = {"deter": 1024, "hidden": 1024, "cnn_depth": 48}
Make = Callable[[Backend, Graph, bool], Callable[[], object]]  # backend, graph, whether compiled -> one update
WAYS: dict[str, tuple[Backend, Graph]] = {
    AUTO: ("auto", "on"),
    AUTO_EAGER: ("auto", "off"),
    REFERENCE: ("reference", "off"),
    REFERENCE_GRAPH: ("reference", "on"),
}
COMPILED_WAY: tuple[Backend, Graph] = ("reference", "on")


def _players(contest: Contest, make: Make) -> Players:
    """Ours and the reference, the latter also compiled, and the peers that are named."""

    def prepare(backend: Backend, graph: Graph, compiles: bool = False) -> Passes:
        return {FORWARD_BACKWARD: make(backend, graph, compiles)}

    def peer(name: str, path: Path) -> Passes:
        found = remote.Remote(name, path, contest.op, contest.shape, contest.dtype, DEVICE.type)
        return Stated({FORWARD_BACKWARD: found.update}, found.facts)

    players: dict[str, Prepare] = {name: functools.partial(prepare, *way) for name, way in WAYS.items()}
    players[COMPILED_GRAPH] = functools.partial(prepare, *COMPILED_WAY, True)
    for name, path in remote.named(contest.op).items():
        players[remote.TITLES[name]] = functools.partial(peer, name, path)
    return players


@contest("pretrain_update", [{"B": 16, "T": 25, **FULL}], ("bfloat16", "tf32"), seconds=150)
def pretrain_update(contest: Contest) -> Players:
    """The video model's update."""
    batch, config = pretrain_setup(DEVICE, contest.torch_dtype, **contest.shape)

    def make(backend: Backend, graph: Graph, compiles: bool) -> Callable[[], object]:
        learner = Pretrainer(replace(config, backend=backend, graph=graph), DEVICE)
        if compiles:
            compile_update(learner)
        return functools.partial(learner.update, batch)

    return _players(contest, make)


@contest("finetune_update", [{"B": 50, "T": 50, **FULL, "horizon": 15}], ("bfloat16",), seconds=300)
def finetune_update(contest: Contest) -> Players:
    """The Meta-world update: world model, 2500 starts × 15 imagined steps, actor and critic."""
    batch, config = finetune_setup(DEVICE, contest.torch_dtype, **contest.shape)

    def make(backend: Backend, graph: Graph, compiles: bool) -> Callable[[], object]:
        agent = Agent(replace(config, backend=backend, graph=graph), ACTIONS, discrete=False, device=DEVICE)
        if compiles:
            compile_update(agent)
        return functools.partial(agent.update, batch)

    return _players(contest, make)

"""What is timed against what: a contest is one op at one size and dtype, with its contestants.

Contestants are "reference" (PyTorch, eager), the same recorded as a CUDA graph, ``torch.compile`` in a graph, around
loops and around a scan, other projects' whole updates (:mod:`bench.peers`), yardsticks that are no implementation of
the op, and every backend for GPUs that the table in :mod:`apv_fast.backend`
has for it, also in a graph: that is how a training update runs them. Nothing here names a kernel.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from apv_fast.backend import AUTO_ORDER, IMPLEMENTATIONS
from bench.gpu.graphs import capture
from bench.registry import COMPILED, FORWARD, FORWARD_BACKWARD, REFERENCE

DEVICE = torch.device("cuda")
OURS = tuple(name for name in AUTO_ORDER["cuda"] if name != REFERENCE)
GRAPH = " in a graph"
REFERENCE_GRAPH, COMPILED_GRAPH = REFERENCE + GRAPH, COMPILED + GRAPH
SCAN_GRAPH = COMPILED + " of a scan" + GRAPH
PHASES = "triton, a launch a phase"
COLD, WARM = "cold", "warm"
DTYPES = {"bfloat16": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}

Work = Callable[[], object]
Passes = Mapping[str, Work]  # FORWARD, FORWARD_BACKWARD -> does it once
Prepare = Callable[[], Passes]  # warms up and records


class Stated(dict[str, Work]):
    """Passes of a contestant of whom more is to be said: ``facts`` go into its rows, in place of what they have."""

    def __init__(self, passes: Passes, facts: Mapping[str, object]) -> None:
        super().__init__(passes)
        self.facts = dict(facts)


Players = Mapping[str, Prepare]


@dataclass(frozen=True)
class Contest:
    """One op at one size and dtype."""

    op: str
    shape: Mapping[str, int]
    dtype: str  # of DTYPES
    players: Callable[[Contest], Players]
    seconds: float = 60.0  # a limit for all of it, compilation included
    caches: tuple[str, ...] = (COLD,)  # what L2 holds before each run

    @property
    def name(self) -> str:
        """Unique: op, size, dtype."""
        return f"{self.op} {' '.join(f'{key}={size}' for key, size in self.shape.items())} {self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the weights."""
        return DTYPES[self.dtype]


CONTESTS: list[Contest] = []


def contest(
    op: str,
    shapes: Sequence[Mapping[str, int]],
    dtypes: Sequence[str] = ("float32",),
    *,
    seconds: float = 60.0,
    caches: tuple[str, ...] = (COLD,),
) -> Callable[[Callable[[Contest], Players]], Callable[[Contest], Players]]:
    """Register the decorated function, which makes the contestants, for ``op`` at every size and dtype."""

    def register(players: Callable[[Contest], Players]) -> Callable[[Contest], Players]:
        CONTESTS.extend(Contest(op, shape, dtype, players, seconds, caches) for shape in shapes for dtype in dtypes)
        return players

    return register


def backends_of(*ops: str) -> list[str]:
    """Our backends for GPUs that have all of these ops in the table."""
    return [name for name in OURS if all(name in IMPLEMENTATIONS[op] for op in ops)]


def differentiable(forward: Callable[[], Sequence[Tensor]], leaves: Sequence[Tensor], *, graph: bool) -> Passes:
    """Both passes of a function: without autograd, and with the gradients with respect to ``leaves``.

    Args:
        forward: the function.
        leaves: what gradients are taken of.
        graph: record each pass, and time its replay.
    """
    with torch.no_grad():
        cotangents = [torch.randn_like(output) for output in forward()]

    def without_gradients() -> object:
        with torch.no_grad():
            return forward()

    def with_gradients() -> object:
        return torch.autograd.grad(list(forward()), list(leaves), cotangents)

    passes: dict[str, Work] = {FORWARD: without_gradients, FORWARD_BACKWARD: with_gradients}
    return {name: capture(work).replay for name, work in passes.items()} if graph else passes


def setting(**variables: str) -> AbstractContextManager[object]:
    """Environment variables for as long as something is prepared."""
    return mock.patch.dict(os.environ, variables) if variables else nullcontext()

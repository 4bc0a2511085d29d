"""Filtering with two models, the second of which sees the first one's features."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from apv_fast import ops
from bench.cases.parts.rssm import DTYPES, FULL, SMALL, Batch, Model, paper, phases, read_by_losses
from bench.gpu.contests import backends_of
from bench.gpu.targets import TWO_SCANS as TWO_SCANS_OF
from bench.registry import BF16, COLD, OnDevice, Other, Passes, Problem, both_passes, case, differentiable

OP = "stacked_observe"
TWO_SCANS = "two own scans"  # rssm_observe twice, the lower model's features in between


@case(OP, [{"B": 16, "T": 25, "E": 1536, "A": 4, **FULL}], dtypes=DTYPES)
@case(OP, [{"B": 8, "T": 25, "E": 512, "A": 6, **SMALL}])
@case(OP, paper([50], A=4), dtypes=DTYPES, slow=True)
def stacked_observe(device: torch.device, dtype: torch.dtype, B: int, T: int, E: int, A: int, **sizes: int) -> Problem:
    """Gradients of every weight of both and of the embedding; also against two scans on the best backend."""
    stack = _Stack(device, dtype, B, T, E, A, sizes, alone=False)
    problem = stack.problem()
    return replace(problem, others={**problem.others, TWO_SCANS: Other(stack.two_scans_on("auto"))})


@case(OP, paper([16, 50], A=4), dtypes=(BF16,), bench=False, device=OnDevice(90, (COLD,)))
def on_device(device: torch.device, dtype: torch.dtype, B: int, T: int, E: int, A: int, **sizes: int) -> Problem:
    """The op alone; for each of our backends also two scans on the same."""
    stack = _Stack(device, dtype, B, T, E, A, sizes, alone=True)
    problem = stack.problem()
    both = {TWO_SCANS_OF + name: Other(stack.two_scans_on(name)) for name in backends_of(OP, "rssm_observe")}
    return replace(problem, others=phases(OP, problem) | both)


class _Stack:
    """Both models and a batch."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        B: int,
        T: int,
        E: int,
        A: int,
        sizes: dict[str, int],
        *,
        alone: bool,
    ) -> None:
        self.lower = Model(device, dtype, E, 0, sizes, B, T, alone=alone)
        self.upper = Model(device, dtype, self.lower.rssm.feat_dim, A, sizes, B, T, alone=alone)
        self.batch = Batch(device, B, T, E, A)

    def leaves(self) -> list[Tensor]:
        return [self.batch.embed, *self.lower.leaves(), *self.upper.leaves()]

    def problem(self) -> Problem:
        return differentiable(self.forward, self.leaves(), slow_to_compile=True)

    def forward(self, backend: str) -> list[Tensor]:
        states = ops.stacked_observe(
            self.lower.params(), self.upper.params(), self.batch.embed, self.batch.is_first, self.batch.action,
            af_latent=self.lower.latent, latent=self.upper.latent,
            af_noise=self.lower.noise_for(backend), noise=self.upper.noise_for(backend), backend=backend,
        )  # fmt: skip
        return read_by_losses(states["af_post"], states["af_prior"]) + read_by_losses(states["post"], states["prior"])

    def two_scans(self, backend: str) -> list[Tensor]:
        embed, is_first, action = self.batch.embed, self.batch.is_first, self.batch.action
        below = ops.rssm_observe(
            self.lower.params(), embed, is_first, None,
            latent=self.lower.latent, noise=self.lower.noise_for(backend), backend=backend,
        )  # fmt: skip
        above = ops.rssm_observe(
            self.upper.params(), self.lower.rssm.feat(below[0]), is_first, action,
            latent=self.upper.latent, noise=self.upper.noise_for(backend), backend=backend,
        )  # fmt: skip
        return read_by_losses(*below) + read_by_losses(*above)

    def two_scans_on(self, backend: str) -> Callable[[], Passes]:
        return functools.partial(both_passes, functools.partial(self.two_scans, backend), self.leaves())

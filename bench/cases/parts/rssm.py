"""What the cases of the RSSM's ops share: sizes, a model with its noise, a batch, contestants of bench.device.

E is the encoder's width at depth 48 or 16; A = 0 is action-free. The dtype of a case is that of the products.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from unittest import mock

import torch
from torch import Tensor

from apv_fast import ops
from apv_fast.nn import RSSM
from apv_fast.types import RSSMParams, State
from bench.gpu.contests import backends_of
from bench.registry import BF16, FP32, REFERENCE, Other, Passes, Problem

DTYPES = (FP32, BF16)
FULL = {"deter": 1024, "hidden": 1024, "stoch": 32, "discrete": 32}
NARROW = {"deter": 200, "hidden": 200, "stoch": 32, "discrete": 32}
SMALL = {"deter": 200, "hidden": 200, "stoch": 16, "discrete": 16}  # the preset "small"
PHASES = "triton, a launch a phase"


class Model:
    """An RSSM as a module has it, and noise ``[*leading, ...]`` for its samples.

    Weights are float32, and every call makes the copies in the products' dtype; all contestants read the same noise.
    With ``alone``, as the targets of ``bench.device`` speak of the op: the weights are leaves in the products' dtype,
    and our kernels make their noise from a seed, as in training. PyTorch's is made beforehand, in its favour.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        embed: int,
        action: int,
        sizes: Mapping[str, int],
        *leading: int,
        alone: bool = False,
    ) -> None:
        self.rssm = RSSM(embed, action, dtype=dtype, **sizes).to(device)  # type: ignore[arg-type]
        self.latent = self.rssm.latent
        self.noise = tuple(
            ops.sample_noise(self.latent, *leading, dtype=torch.float32, device=device) for _ in range(2)
        )
        self.seeds = tuple(torch.tensor(seed, device=device) for seed in (1, 2)) if alone else self.noise
        self._leaves: RSSMParams | None = None
        if alone:
            self._leaves = RSSMParams(*(weight.detach().to(dtype).requires_grad_() for weight in self.rssm.params()))

    def params(self) -> RSSMParams:
        """The weights in the products' dtype."""
        return self.rssm.params() if self._leaves is None else self._leaves

    def freeze(self) -> None:
        """From now on no weight has a gradient, as in imagination."""
        for weight in self.leaves():
            weight.requires_grad_(False)

    def leaves(self) -> list[Tensor]:
        """What gradients are taken of."""
        return list(self.rssm.parameters()) if self._leaves is None else list(self._leaves)

    def noise_for(self, name: str) -> tuple[Tensor, Tensor]:
        """Of the posterior's samples and the prior's, for the backend of this name."""
        first, second = self.noise if name == REFERENCE else self.seeds
        return first, second


class Batch:
    """``embed [B, T, E]``, ``is_first [B, T]`` with one start inside, ``action [B, T, A]``."""

    def __init__(self, device: torch.device, B: int, T: int, E: int, A: int) -> None:
        self.is_first = torch.zeros(B, T, dtype=torch.bool, device=device)
        self.is_first[:, 0] = self.is_first[0, T // 2] = True
        self.embed = torch.randn(B, T, E, device=device).requires_grad_()
        self.action = torch.rand(B, T, A, device=device) * 2 - 1


def read_by_losses(post: State, prior: State) -> list[Tensor]:
    """The outputs that get a gradient in training."""
    return [post["deter"], post["stoch"], post["logit"], prior["logit"]]


def phases(op: str, problem: Problem) -> dict[str, Other]:
    """Triton's scan with a launch a phase in place of one for all, where Triton runs ``op``."""

    def work(run: Callable[[str], object]) -> object:
        with mock.patch.dict(os.environ, {"APV_FAST_SCAN": "phases"}):
            return run("triton")

    def prepare() -> Passes:
        return {passed: functools.partial(work, run) for passed, run in problem.passes.items()}

    return {PHASES: Other(prepare)} if "triton" in backends_of(op) else {}


def imagined(start: State) -> State:
    """States of the same shapes to start from, of random numbers."""
    return {key: torch.randn_like(value) for key, value in start.items()}


def paper(sizes: Sequence[int], **more: int) -> list[dict[str, int]]:
    """Batches of the paper's length at full size."""
    return [{"B": batch, "T": 50, "E": 1536, **more, **FULL} for batch in sizes]

"""The RSSM ops of the CPU engine at the sizes of laptops, papers and edge cases; the bodies are those of all backends.

All sizes together are tens of thousands of problems. :data:`DESIGN` has each size, latent, dtype and op with each value
of every other one, in 49. The rest, by op, dtype and latent: ``pytest -m slow -k "whole_product and observe"``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from apv_fast.backend import probe
from tests.ops import rssm_rollout_problems
from tests.support import rssm_errors
from tests.support.rssm_cases import Sizes

if not probe("cpu").available:
    pytest.skip(f"cpu: {probe('cpu').reason}", allow_module_level=True)

# Seven entries each, in an order in which few of the 49 problems are large.
FACTORS: dict[str, list[object]] = {
    "batch": [3, 2, 16, 1, 50, 17, 2],
    "deter": [7, 200, 7, 600, 48, 1, 1024],
    "length": [2, 1, 17, 50, 2, 3, 16],
    "hidden": [1024, 48, 7, 7, 1, 600, 200],
    "latent": [(6, 5), (1, 2), (1, 2), (1, 2), (32, 32), (6, 5), (32, 32)],
    "dtype": ["float32", "bfloat16", "bfloat16", "float32", "float64", "float64", "float32"],
    "op": ["rollout", "imagine", "observe", "stacked", "observe", "step", "stacked"],
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Results do not depend on the number of threads; times do, where other tests run beside this one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Problem(NamedTuple):
    """One value of every factor."""

    batch: int
    deter: int
    length: int
    hidden: int
    latent: tuple[int, int]
    dtype: str
    op: str

    def __str__(self) -> str:
        (stoch, discrete), dtype = self.latent, self.dtype
        return f"{self.op} {dtype} B{self.batch} T{self.length} D{self.deter} H{self.hidden} {stoch}x{discrete}"

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.batch, self.length, 7, 2, 3, self.deter, self.hidden, *self.latent)

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def imagination(self) -> rssm_rollout_problems.Case:
        return rssm_rollout_problems.Case(self.sizes, units=self.hidden)

    def check(self) -> None:
        """Values and gradients, at most twice PyTorch's own error."""
        if self.op == "rollout":
            rssm_rollout_problems.assert_exact("cpu", self.imagination, self.torch_dtype, tiny=True)
        else:
            rssm_errors.assert_exact(self.op, "cpu", self.sizes, self.torch_dtype, True, tiny=True)


# Bose 1938: two coordinates of a plane over the integers modulo 7 decide the rest, and any two of them each other.
DESIGN = [
    Problem(*(levels[(i + slope * j) % 7] for slope, levels in enumerate(FACTORS.values())))  # type: ignore[arg-type]
    for i, j in itertools.product(range(7), repeat=2)
]


def test_the_design_has_every_pair() -> None:
    for (i, one), (j, other) in itertools.combinations(enumerate(FACTORS.values()), 2):
        assert {(problem[i], problem[j]) for problem in DESIGN} == set(itertools.product(one, other))


@pytest.mark.statistical
@pytest.mark.parametrize("problem", DESIGN, ids=str)
def test_every_pair_of_sizes(problem: Problem) -> None:
    problem.check()


@pytest.mark.slow
@pytest.mark.parametrize("op", sorted({str(op) for op in FACTORS["op"]}))
@pytest.mark.parametrize("dtype", sorted({str(dtype) for dtype in FACTORS["dtype"]}))
@pytest.mark.parametrize("latent", [(1, 2), (6, 5), (32, 32)], ids=lambda latent: "x".join(map(str, latent)))
def test_whole_product(op: str, dtype: str, latent: tuple[int, int]) -> None:
    """1296 problems, some of them of several seconds."""
    failed = {}
    small = [sorted(set(FACTORS[name])) for name in ("batch", "deter", "length", "hidden")]  # type: ignore[type-var]
    for batch, deter, length, hidden in itertools.product(*small):
        problem = Problem(batch, deter, length, hidden, latent, dtype, op)  # type: ignore[arg-type]
        try:
            problem.check()
        except AssertionError as error:
            failed[str(problem)] = str(error)
    assert not failed, failed

"""Problems for ``mlp``, and how exact backends are."""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor

from apv_fast.ops import mlp
from tests.support.yardstick import PlainSums, judge, least, seed_of, yardsticks

# Rows and widths: one of each; sizes that no tile divides; more than a block of rows; sums of two stretches.
SIZES = [(1, [1, 1]), (7, [5, 3, 2]), (130, [67, 130, 33]), (401, [64, 200, 200, 70]), (260, [2300, 65])]

Layers = list[tuple[Tensor, Tensor]]


def inputs(rows: int, widths: list[int], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Layers, Tensor]:
    """Leaves, and a cotangent."""
    generator = torch.Generator().manual_seed(seed_of(rows + 1000 * seed))

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    layers = [(leaf(n, k, scale=k**-0.5), leaf(n)) for k, n in itertools.pairwise(widths)]
    return leaf(rows, widths[0]), layers, leaf(rows, widths[-1]).detach()


def run(x: Tensor, layers: Layers, cotangent: Tensor, backend: str) -> list[Tensor]:
    """Output and gradients."""
    y = mlp(x, layers, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, [x, *(w for layer in layers for w in layer)], cotangent)]


def relative_errors(results: list[Tensor], wanted: list[Tensor]) -> dict[str, float]:
    """Of each tensor; of those of fewer than 64 numbers, of which a single one decides, together."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for i, (a, right) in enumerate(zip(results, wanted, strict=True)):
        name = str(i) if right.numel() >= 64 else "few numbers"
        groups.setdefault(name, []).append((torch.dist(a.double(), right).item(), right.norm().item()))
    return {name: math.hypot(*(e for e, _ in of)) / math.hypot(*(n for _, n in of)) for name, of in groups.items()}


def assert_exact(backend: str, size: tuple[int, list[int]], dtype: torch.dtype) -> None:
    """Values and gradients, see :func:`tests.support.yardstick.judge`."""
    # Float64's truth is a plain sum itself, and no better.
    measured, floor = ("reference", 2.0) if dtype == torch.float64 else (backend, 0.5)

    def measure(seed: int) -> dict[str, tuple[float, float]]:
        x, layers, cotangent = inputs(*size, dtype, seed)
        exact = [(w.detach().double().requires_grad_(), b.detach().double().requires_grad_()) for w, b in layers]
        with PlainSums():  # type: ignore[no-untyped-call] # MKL's long sums are less exact than ours
            wanted = run(x.detach().double().requires_grad_(), exact, cotangent.double(), "reference")
        got = run(x, layers, cotangent, backend)
        plain = yardsticks(functools.partial(run, x, layers, cotangent, "reference"), measured)
        assert all(a.dtype == dtype and a.shape == right.shape for a, right in zip(got, wanted, strict=True))
        ours, own = relative_errors(got, wanted), least(relative_errors(each, wanted) for each in plain)
        return {name: (error, own[name]) for name, error in ours.items()}

    floors = {name: floor * torch.finfo(dtype).eps for name in measure(0)}
    judge(measure, dtype, exact=False, floors=floors)

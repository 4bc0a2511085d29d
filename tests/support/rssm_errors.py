"""How far an RSSM op is from a float64 run, and how far it may be."""

from __future__ import annotations

import statistics

import torch

from apv_fast.backend import probe
from tests.support.rssm_cases import (
    CASES,
    Sizes,
    Tensors,
    make_case,
)
from tests.support.yardstick import VARIATION, judge, least, yardsticks

# Largest relative error of the reference itself that is believed, per tensor; backends may have twice its actual error.
REFERENCE_ERROR = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.1}
FEW = 64  # numbers; see measure
LEAVES_NOT = ("is_first", "noise")


def taken(backend: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype, or the widest one that the backend takes instead."""
    dtypes = probe(backend).dtypes
    return dtype if dtype in dtypes else max(dtypes, key=lambda other: other.itemsize)


def run(case: str, tensors: Tensors, sizes: Sizes, backend: str, sample: bool = True) -> Tensors:
    """All outputs of a case, and the gradients of Σ output·cotangent under "grad NAME"."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items() if not name.endswith(LEAVES_NOT)}
    outputs = CASES[case][1](tensors | leaves, sizes, backend, sample)
    generator = torch.Generator().manual_seed(99)
    loss = torch.zeros((), dtype=torch.float64)
    for name in sorted(outputs):
        cotangent = torch.randn(outputs[name].shape, generator=generator, dtype=torch.float64)
        loss = loss + (outputs[name].double().cpu() * cotangent).sum()
    loss.backward()
    gradients = {f"grad {name}": torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()}
    return {name: x.detach() for name, x in outputs.items()} | gradients


def relative_errors(got: Tensors, expected: Tensors) -> dict[str, float]:
    assert got.keys() == expected.keys()
    result = {}
    for name, want in expected.items():
        assert got[name].shape == want.shape, name
        difference, size = torch.dist(got[name].double().cpu(), want.double().cpu()).item(), want.norm().item()
        result[name] = difference / size if size else (0.0 if difference == 0 else float("inf"))
    return result


def compare(
    case: str, backend: str, sizes: Sizes, dtype: torch.dtype, sample: bool, seed: int
) -> tuple[Tensors, dict[str, float], dict[str, float]]:
    """What a float64 run gives, and the relative errors of this backend and of the reference in this dtype."""
    device = probe(backend).devices[-1]
    tensors = make_case(case, sizes, dtype, seed, device)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
    expected = run(case, exact, sizes, "reference", sample)
    plain = yardsticks(lambda: run(case, tensors, sizes, "reference", sample), backend)
    reference = least(relative_errors(own, expected) for own in plain)
    return expected, relative_errors(run(case, tensors, sizes, backend, sample), expected), reference


def measure(
    case: str, backend: str, sizes: Sizes, dtype: torch.dtype, sample: bool, seed: int, tiny: bool = False
) -> dict[str, tuple[float, float]]:
    """Relative errors (this backend's, the reference's in the same dtype) against a float64 run, by tensor.

    Below float64, tensors of a few numbers are taken together: the error of a handful of roundings is luck, of both.
    ``tiny``: so is the bound of the reference's own error; with sizes of 1 some tensors nearly cancel. In variations
    that bound is not asked for: which problem is ill-conditioned is then luck.
    """
    expected, got, reference = compare(case, backend, sizes, dtype, sample, seed)
    for name, error in () if tiny or VARIATION else reference.items():
        assert error <= REFERENCE_ERROR[dtype], f"reference {name}: {error:.2e}"
    errors = {name: (got[name], reference[name]) for name in got}
    if few := [errors.pop(name) for name in got if dtype != torch.float64 and expected[name].numel() < FEW]:
        ours, own = (statistics.fmean(error**2 for error in side) ** 0.5 for side in zip(*few, strict=True))
        errors["tensors of a few numbers"] = ours, own
    for name, (_, error) in () if VARIATION or (tiny and len(errors) == 1) else errors.items():
        assert error <= REFERENCE_ERROR[dtype], f"reference {name}: {error:.2e}"
    return errors


def assert_exact(
    case: str, backend: str, sizes: Sizes, dtype: torch.dtype, sample: bool, seed: int = 0, tiny: bool = False
) -> None:
    """Values and gradients, see :func:`tests.support.yardstick.judge`."""
    judge(
        lambda i: measure(case, backend, sizes, dtype, sample, seed + i, tiny),
        dtype,
        exact=backend != "reference",  # the reference has no error against itself
        vanishing=1 in (sizes.deter, sizes.hidden),
    )

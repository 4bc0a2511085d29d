"""Gradients of weights on the CPU: what was seen is not put together, and one-hots are looked up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apv_fast.backend import probe

if not probe("cpu").available:
    pytest.skip(f"cpu: {probe('cpu').reason}", allow_module_level=True)

from apv_fast.cpu.parts.product import weight_gradient
from apv_fast.recurrence.phases import Before, TorchProducts
from tests.support.yardstick import another, judge, seed_of, yardsticks

# B, T, H, S, C; the last with more than 64 steps in a class, and more columns than a thread takes at once
SHAPES = [(2, 1, 1, 1, 2), (3, 5, 7, 6, 5), (16, 25, 200, 16, 16), (4, 200, 300, 2, 3)]


def problem(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, list[Tensor | Before], int]:
    batch, length, hidden, groups, classes = shape
    torch.manual_seed(seed_of(0))
    chosen = torch.randint(classes, (batch, length, groups))
    stoch = torch.nn.functional.one_hot(chosen, classes).float().flatten(2)
    is_first = torch.rand(batch, length) < 0.2
    is_first[0, 0] = False  # what was seen before is not one-hot
    before = Before(torch.randn(batch, groups, classes), stoch, is_first, one_hot=True)
    action = torch.randn(batch, length, 3)
    return torch.randn(batch, length, hidden).to(dtype), [before, action], groups * classes + 5


@pytest.mark.statistical
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_one_product(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    def measure(seed: int) -> dict[str, tuple[float, float]]:
        with another(seed):
            grad, seen, columns = problem(shape, dtype)
        exact = TorchProducts().weight_gradient(grad.double(), seen, columns)
        torchs = yardsticks(lambda: TorchProducts().weight_gradient(grad, seen, columns))
        errors = {}
        for name, got, right, *theirs in zip(
            ("weight", "bias"), weight_gradient(grad, seen, columns), exact, *torchs, strict=True
        ):
            assert got.shape == right.shape and got.dtype == dtype
            error, *others = (torch.dist(x.double(), right).item() / right.norm().item() for x in (got, *theirs))
            errors[name] = (error, min(others))
        return errors

    judge(measure, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_any_number_of_threads(dtype: torch.dtype) -> None:
    grad, seen, columns = problem((4, 200, 300, 2, 3), dtype)
    grads, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            grads.append(weight_gradient(grad, seen, columns)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])

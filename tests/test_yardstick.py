"""The yardstick itself, and that what is wrong by little is outside of its bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apv_fast.backend import probe
from tests.ops import mlp_problems, rssm_rollout_problems
from tests.support import rssm_errors
from tests.support.rssm_cases import SIZES
from tests.support.yardstick import PROBLEMS, TERMS, PlainSums, judge, product

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def test_plain_sums_term_by_term() -> None:
    a, b = randn(3, 150), randn(150, 5)
    total = torch.zeros(3, 5)
    for first in range(0, 150, TERMS):
        block = torch.zeros(3, 5)
        for k in range(first, min(150, first + TERMS)):
            block = block + a[:, k, None] * b[k]
        total = block if first == 0 else total + block
    assert torch.equal(product(a, b), total)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 0, 2), (0, 3, 2), (2, 3, 0), (70, 130, 3000)], ids=str)
@all_dtypes
def test_products(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Of any shape; more sums than are made together."""
    m, k, n = shape
    a, b = randn(m, k, dtype=dtype), randn(k, n, dtype=dtype)
    got, exact = product(a, b), a.double() @ b.double()
    assert got.dtype == dtype and got.shape == (m, n)
    assert torch.dist(got.double(), exact) <= 4 * torch.finfo(dtype).eps * exact.norm()


LAYERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w, b: F.linear(x.flatten(1), w.flatten(1), b),
    "product": lambda x, w, b: x.flatten(1) @ w.flatten(1).T + b,
    "products of a batch": lambda x, w, b: x.flatten(2) @ w.flatten(2).mT + b[:3],
    "convolution": lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1),
    "transposed convolution": lambda x, w, b: F.conv_transpose2d(x, w.transpose(0, 1), b, stride=2, padding=1),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=list(LAYERS))
@all_dtypes
def test_layers_and_their_gradients(layer: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    leaves = [randn(4, 3, 4, 4, dtype=dtype), randn(4, 3, 4, 4, dtype=dtype), randn(4, dtype=dtype)]

    def run(leaves: list[Tensor]) -> list[Tensor]:
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        y = layer(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    exact = run([leaf.double() for leaf in leaves])
    with PlainSums():  # type: ignore[no-untyped-call]
        got = run(leaves)
    for one, right in zip(got, exact, strict=True):
        assert torch.dist(one.double(), right) <= 2 * torch.finfo(dtype).eps * right.norm()


def test_a_product_that_is_not_written_out_is_an_error() -> None:
    with PlainSums(), pytest.raises(NotImplementedError, match="product of the local BLAS"):  # type: ignore[no-untyped-call]
        torch.mv(randn(2, 3), randn(3))


def test_the_mean_square_decides() -> None:
    """One problem within: no more are asked. One outside, the mean within; and the mean outside, too."""
    asked: list[int] = []

    def measure(seed: int, errors: Callable[[int], float]) -> dict[str, tuple[float, float]]:
        asked.append(seed)
        return {"x": (errors(seed), 1e-6)}

    judge(lambda seed: measure(seed, lambda _: 1.9e-6), torch.float32)
    assert asked == [0]
    asked.clear()
    judge(lambda seed: measure(seed, lambda i: 2.1e-6 if i == 0 else 1.9e-6), torch.float32)
    assert asked == [0, 1, 2, 3]
    asked.clear()
    with pytest.raises(AssertionError, match=r"error 2.10e-06, PyTorch 1.00e-06"):
        judge(lambda seed: measure(seed, lambda _: 2.1e-6), torch.float32)
    assert asked == list(range(PROBLEMS[-1]))
    with pytest.raises(AssertionError):
        judge(lambda seed: measure(seed, lambda _: float("nan")), torch.float32)


# What a kernel may get wrong by little; of a product's operands and the function that it calls.
Product = Callable[..., Tensor]
FAULTS: dict[str, Callable[[Product, Tensor, Tensor], Tensor]] = {
    "a dropped term": lambda product, a, b: product(a[:, :-1], b[:-1]),
    "a scale off by 1e-6": lambda product, a, b: product(a, b) * (1 + 1e-6),
    "sums in bfloat16": lambda product, a, b: product(a, b).bfloat16().to(b.dtype),
}
PROBLEMS_OF: dict[str, Callable[[], None]] = {
    "mlp": lambda: mlp_problems.assert_exact("cpu", mlp_problems.SIZES[2], torch.float32),
    "observe": lambda: rssm_errors.assert_exact("observe", "cpu", SIZES["wide"], torch.float32, True),
    "stacked": lambda: rssm_errors.assert_exact("stacked", "cpu", SIZES["odd"], torch.float32, True),
    "small observe": lambda: rssm_errors.assert_exact("observe", "cpu", SIZES["odd"], torch.float32, True),
}


@pytest.mark.skipif(not probe("cpu").available, reason="the C++ extension is not built")
@pytest.mark.parametrize("fault", FAULTS.values(), ids=list(FAULTS))
@pytest.mark.parametrize("problem", PROBLEMS_OF.values(), ids=list(PROBLEMS_OF))
def test_planted_faults(
    problem: Callable[[], None],
    fault: Callable[[Product, Tensor, Tensor], Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the products around the recurrence."""
    from apv_fast.cpu.parts import product as module

    problem()
    right = module._dense

    def wrong(a: Tensor, b: Tensor, bias: Tensor | None, *, out: Tensor | None = None, **options: Any) -> Tensor:
        result = fault(lambda a, b: right(a, b, bias, **options), a, b)
        return result if out is None else out.copy_(result)

    monkeypatch.setattr(module, "_dense", wrong)
    with pytest.raises(AssertionError):
        problem()


@pytest.mark.skipif(not probe("cpu").available, reason="the C++ extension is not built")
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1 + 1e-6), (torch.bfloat16, 1.01)], ids=str)
def test_planted_faults_in_outputs(dtype: torch.dtype, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of imagination, whose products are all within."""
    case = rssm_rollout_problems.CASES["odd"]
    right = rssm_rollout_problems.rollout

    def wrong(tensors: Any, case: Any, backend: str | None, **changes: Any) -> Any:
        outputs = right(tensors, case, backend, **changes)
        return outputs | {"logit": outputs["logit"] * scale} if backend == "cpu" else outputs

    rssm_rollout_problems.assert_exact("cpu", case, dtype)
    monkeypatch.setattr(rssm_rollout_problems, "rollout", wrong)
    with pytest.raises(AssertionError):
        rssm_rollout_problems.assert_exact("cpu", case, dtype)

"""The λ-return on every backend, against a float64 run of its definition written out element by element."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apv_fast.backend import IMPLEMENTATIONS, probe
from apv_fast.ops import lambda_return
from tests.ops.lambda_return_problems import (
    DTYPES,
    NAMES,
    assert_as_exact_as_reference,
    device_of,
    errors,
    inputs,
    run,
    truth,
)
from tests.support import GOLDEN
from tests.support.yardstick import VARIATION, judge

SHAPES = [(1, 1), (1, 5), (2, 1), (3, 7), (15, 64), (15, 65), (16, 20), (17, 130), (33, 3), (15, 2500)]
BACKENDS = [name for name in IMPLEMENTATIONS["lambda_return"] if probe(name).available]


@pytest.mark.statistical
@pytest.mark.interpreted("3x7")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients(backend: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """See :func:`tests.support.yardstick.judge`."""

    def measure(seed: int) -> dict[str, tuple[float, float]]:
        tensors = inputs(shape, dtype, device_of(backend), seed=seed)
        expected, results = truth(tensors), run(tensors, backend)
        for name, tensor in results.items():
            assert tensor.dtype == dtype and tensor.shape == expected[name].shape, name
        got, reference = errors(results, expected), errors(run(tensors, "reference"), expected)
        for name, error in reference.items():
            few = results[name].numel() < 64  # other numbers than the usual ones may all but cancel
            assert error <= 2 * torch.finfo(dtype).eps or (few and VARIATION), f"reference {name}: {error:.2e}"
        return {name: (error, reference[name]) for name, error in got.items()}

    judge(measure, dtype, exact=False)


@pytest.mark.statistical
@pytest.mark.interpreted
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None, derandomize=not VARIATION)
@given(st.integers(1, 40), st.integers(1, 150), st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_any_shape(backend: str, horizon: int, n: int, dtype: torch.dtype, seed: int) -> None:
    tensors = inputs((horizon, n), dtype, device_of(backend), seed=seed, positive=True)
    assert_as_exact_as_reference(tensors, backend)


def _spaced(tensor: Tensor) -> Tensor:
    """The same numbers, neither dimension contiguous."""
    wide = tensor.new_full((*(2 * size for size in tensor.shape),), float("nan"))
    every_other = wide[(slice(None, None, 2),) * tensor.dim()]
    return every_other.copy_(tensor)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda tensor: tensor.mT.contiguous().mT if tensor.dim() == 2 else tensor,
    "spaced": _spaced,
    "expanded": lambda tensor: tensor[..., :1].expand_as(tensor),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: str, layout: str) -> None:
    """Inputs and cotangent in another layout: bit for bit what their contiguous copies give."""
    strided = {
        name: LAYOUTS[layout](tensor) for name, tensor in inputs((15, 70), torch.float32, device_of(backend)).items()
    }
    assert not strided["reward"].is_contiguous()
    expected = run({name: tensor.contiguous() for name, tensor in strided.items()}, backend)
    for name, tensor in run(strided, backend).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_official_implementation(backend: str) -> None:
    """golden/lambda_return.npz, made by the official TensorFlow code."""
    with np.load(GOLDEN / "lambda_return.npz", allow_pickle=False) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file if name != "meta"}
    results = run({name: tensor.to(device_of(backend)) for name, tensor in arrays.items()}, backend)
    for name, error in errors(results, {name: arrays[name].double() for name in results}).items():
        assert error <= (1e-5 if name == "returns" else 1e-4), f"{name}: {error:.2e}"


@pytest.mark.interpreted
@pytest.mark.parametrize("lambda_", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str, lambda_: float) -> None:
    tensors = inputs((4, 3), torch.float64, device_of(backend))
    leaves = [tensors[name].requires_grad_() for name in NAMES]
    assert torch.autograd.gradcheck(lambda *x: lambda_return(*x, lambda_=lambda_, backend=backend), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    tensors = inputs((4, 3), torch.float32, device_of(backend))
    leaves = tuple(tensors[name].requires_grad_() for name in NAMES)
    torch.library.opcheck(torch.ops.apv_fast.lambda_return.default, (*leaves, 0.95, backend))
    if backend != "reference":
        own = getattr(torch.ops.apv_fast, f"lambda_return_{backend}")
        torch.library.opcheck(own.default, (*leaves, 0.95, True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_break(backend: str) -> None:
    tensors = inputs((5, 6), torch.float32, device_of(backend))
    compiled: Callable[..., Tensor] = torch.compile(lambda_return, fullgraph=True, backend="aot_eager")
    result = compiled(*(tensors[name] for name in NAMES), backend=backend)
    torch.testing.assert_close(result, run(tensors, backend)["returns"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_columns(backend: str) -> None:
    results = run(inputs((3, 0), torch.float32, device_of(backend)), backend)
    assert {name: tuple(tensor.shape) for name, tensor in results.items()} == {
        "returns": (3, 0), "grad_reward": (3, 0), "grad_value": (3, 0), "grad_discount": (3, 0), "grad_bootstrap": (0,),
    }  # fmt: skip


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank": ({"reward": torch.zeros(3)}, ValueError, "reward"),
    "rows": ({"value": torch.zeros(2, 4)}, ValueError, "value"),
    "columns": ({"discount": torch.zeros(3, 5)}, ValueError, "discount"),
    "bootstrap": ({"bootstrap": torch.zeros(5)}, ValueError, "bootstrap"),
    "dtype": ({"value": torch.zeros(3, 4, dtype=torch.float64)}, TypeError, "value"),
    "integer": ({"reward": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "reward"),
    "no tensor": ({"discount": 0.99}, TypeError, "discount"),
    "lambda": ({"lambda_": 1.5}, ValueError, "lambda_"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case: str) -> None:
    changed, error, name = BAD[case]
    good = {"reward": torch.zeros(3, 4), "value": torch.zeros(3, 4), "discount": torch.zeros(3, 4)}
    with pytest.raises(error, match=re.escape(name)):
        lambda_return(**(good | {"bootstrap": torch.zeros(4)} | changed))


def test_no_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="H must be at least 1"):
        lambda_return(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(4))

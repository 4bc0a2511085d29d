"""``mlp`` and the products behind it on every backend, against float64 runs."""

from __future__ import annotations

import importlib

import pytest
import torch

from apv_fast.backend import IMPLEMENTATIONS, probe
from apv_fast.ops import mlp
from tests.ops.mlp_problems import SIZES, assert_exact, inputs, run

BACKENDS = [name for name in IMPLEMENTATIONS["mlp"] if probe(name).available]
every = pytest.mark.parametrize("backend", BACKENDS)
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.statistical
@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(backend: str, size: tuple[int, list[int]], dtype: torch.dtype) -> None:
    assert_exact(backend, size, dtype)


@every
def test_strides_and_leading_dimensions(backend: str) -> None:
    x, layers, cotangent = inputs(130, [67, 130, 33], torch.float32)
    wanted = run(x, layers, cotangent, backend)
    turned = [(w.detach().T.contiguous().T.requires_grad_(), b) for w, b in layers]
    wide = torch.full((130, 134), torch.nan)
    wide[:, ::2] = x.detach()
    for same in (x.detach().T.contiguous().T, wide[:, ::2], x.detach().expand(1, -1, -1)[0]):
        got = run(same.requires_grad_(), turned, cotangent, backend)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert torch.equal(mlp(x.view(2, 5, 13, 67), layers, backend=backend).view(130, 33), wanted[0])


@every
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_wide_input_of_a_narrow_network(backend: str, size: tuple[int, list[int]]) -> None:
    x, layers, cotangent = inputs(*size, torch.bfloat16)
    wide = x.detach().float().requires_grad_()
    got, wanted = run(wide, layers, cotangent, backend), run(x, layers, cotangent, backend)
    assert got[1].dtype == torch.float32
    for a, b in zip(got, wanted, strict=True):
        assert torch.dist(a.float(), b.float()) <= 0.01 * b.float().norm()


@every
def test_only_what_is_wanted(backend: str) -> None:
    x, layers, cotangent = inputs(130, [67, 130, 33], torch.float32)
    wanted = run(x, layers, cotangent, "reference")
    frozen = [(w.detach(), b.detach()) for w, b in layers]
    (of_x,) = torch.autograd.grad(mlp(x, frozen, backend=backend), x, cotangent)
    torch.testing.assert_close(of_x, wanted[1], rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(
        mlp(x.detach(), layers, backend=backend), [w for pair in layers for w in pair], cotangent
    )
    for a, b in zip(grads, wanted[2:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not mlp(x.detach(), frozen, backend=backend).requires_grad


@every
def test_nan_stays_in_its_row(backend: str) -> None:
    x, layers, _ = inputs(130, [67, 130, 33], torch.float32)
    bad = x.detach().clone()
    bad[5, 3] = torch.nan
    y = mlp(bad, layers, backend=backend).detach()
    assert y[5].isnan().all() and not y[:5].isnan().any() and not y[6:].isnan().any()


@every
def test_no_rows(backend: str) -> None:
    _, layers, _ = inputs(1, [67, 130, 33], torch.float32)
    assert mlp(torch.empty(0, 67), layers, backend=backend).shape == (0, 33)


def test_opcheck() -> None:
    importlib.import_module("apv_fast.cpu.mlp")  # registers it
    x, layers, _ = inputs(7, [5, 3, 2], torch.float32)
    torch.library.opcheck(torch.ops.apv_fast.mlp_cpu, (x, [w for layer in layers for w in layer], True))


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512bf16"])
def test_instruction_sets_and_threads(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from apv_fast import _C

    if isa not in _C.supported_isas():
        pytest.skip(f"this machine cannot run {isa}")
    monkeypatch.setenv("APV_FAST_CPU_ISA", isa)
    x, layers, cotangent = inputs(401, [70, 200, 65], torch.float32)
    wanted, before = run(x, layers, cotangent, "reference"), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(x, layers, cotangent, "cpu"))
    finally:
        torch.set_num_threads(before)
    for a, b, right in zip(results[0], results[1], wanted, strict=True):
        torch.testing.assert_close(a, right, rtol=1e-4, atol=1e-4)
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[2], strict=True))


def test_bad_arguments() -> None:
    x, layers, _ = inputs(7, [5, 3, 2], torch.float32)
    with pytest.raises(ValueError, match="layers is empty"):
        mlp(x, [])
    with pytest.raises(ValueError, match=r"layers\[1\] weight has shape \(3, 5\)"):
        mlp(x, [layers[0], layers[0]])
    with pytest.raises(TypeError, match=r"layers\[0\] bias has dtype torch.float64; it must be torch.float32"):
        mlp(x, [(layers[0][0], layers[0][1].double())])

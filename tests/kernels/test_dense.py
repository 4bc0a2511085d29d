"""The Triton products of imagination, with more tiles in each direction than a roll-out of a few rows has."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apv_fast.backend import probe
from apv_fast.ops import Latent

DEVICE = probe("triton").devices[-1] if probe("triton").available else ""
needs_triton = pytest.mark.skipif(not DEVICE, reason="Triton cannot run here")


@pytest.fixture
def dense() -> ModuleType:
    pytest.importorskip("triton")
    from apv_fast.kernels.parts import dense

    return dense


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE)


@needs_triton
@pytest.mark.parametrize("columns", [64, 65, 131], ids=lambda n: f"{n} columns")
@pytest.mark.parametrize("rows", [1, 33, 150], ids=lambda n: f"{n} rows")
def test_a_layer(dense: ModuleType, rows: int, columns: int) -> None:
    """Operands in a piece of a row, weights in either order; the activation's argument; nothing written elsewhere."""
    torch.manual_seed(0)
    x, w, bias = randn(rows, 80)[:, 5:75], randn(columns, 70).T.contiguous().T, randn(columns)
    room, keep = randn(rows, columns + 5), torch.empty_like(randn(rows, columns))
    untouched = room[:, columns:].clone()
    dense.dense(room[:, :columns], x, w, bias, elu=True, keep=keep)
    expected = F.linear(x, w, bias)
    torch.testing.assert_close(keep, expected)
    torch.testing.assert_close(room[:, :columns], F.elu(expected))
    assert torch.equal(room[:, columns:], untouched)
    out, gate = torch.empty_like(keep), randn(rows, columns).requires_grad_()
    dense.dense(out, x, w.contiguous(), gate=gate.detach())
    (slope,) = torch.autograd.grad(F.elu(gate).sum(), gate)
    torch.testing.assert_close(out, x @ w.T * slope)


@needs_triton
@pytest.mark.parametrize(("stoch", "classes"), [(5, 1), (11, 7), (9, 32)])
def test_logits_with_their_samples_and_back(dense: ModuleType, stoch: int, classes: int) -> None:
    from apv_fast.kernels.parts.latent import whole

    torch.manual_seed(0)
    latent, rows, width = Latent(stoch, classes), 21, stoch * classes
    assert dense.fits(latent, rows, randn(1))
    x, w, bias, noise = randn(rows, 70), randn(width, 70), randn(width), randn(rows, stoch, classes)
    logit, sample, narrow = (torch.empty_like(randn(rows, width)) for _ in range(3))
    dense.dense_sample(x, w, bias, whole(noise, width), latent, logit, sample, narrow)
    expected = F.linear(x, w, bias)
    torch.testing.assert_close(logit, expected)
    chosen = (expected.view(noise.shape) + noise).argmax(-1)
    assert torch.equal(sample.view(noise.shape), F.one_hot(chosen, classes).double())
    assert torch.equal(sample, narrow)
    of_stoch, own, out = randn(rows, width), randn(rows, width), torch.empty_like(logit)
    dense.dense_softmax(x, w, of_stoch, own, logit, latent, out)
    leaf = logit.requires_grad_()
    probs = leaf.view(noise.shape).softmax(-1).flatten(1)
    (through,) = torch.autograd.grad(probs, leaf, x @ w.T + of_stoch)
    torch.testing.assert_close(out, through + own)


@needs_triton
@pytest.mark.parametrize(("hidden", "deter"), [(70, 65), (3, 130)])
def test_the_grus_backward_product(dense: ModuleType, hidden: int, deter: int) -> None:
    torch.manual_seed(0)
    rows = 19
    grad, w, x, carry = (
        randn(rows, 3 * deter),
        randn(3 * deter, hidden + deter),
        randn(rows, hidden),
        randn(rows, deter),
    )
    out, leaf = torch.empty_like(x), x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.elu(leaf).sum(), leaf)
    both = grad @ w
    expected = carry + both[:, hidden:]
    dense.gru_backward(grad, w, x, out, carry)
    torch.testing.assert_close(out, both[:, :hidden] * slope)
    torch.testing.assert_close(carry, expected)


@needs_triton
def test_extreme_actions_have_finite_gradients() -> None:
    """Saturated heads, and uniforms at both ends: samples inside the bounds, gradients finite."""
    pytest.importorskip("triton")
    from apv_fast.kernels.parts import truncated_normal
    from apv_fast.kernels.parts.latent import whole

    values = torch.tensor([-50.0, -8.0, 0.0, 8.0, 50.0])
    uniforms = torch.tensor([0.0, 2.0**-24, 0.5, 1 - 2.0**-24])
    grid = torch.cartesian_prod(values, values, uniforms).to(DEVICE)
    head, noise = grid[:, :2].contiguous(), grid[:, 2:].contiguous()
    action, gradient = torch.empty_like(noise), torch.empty_like(head)
    truncated_normal.sample(head, whole(noise, 1), 0.1, action, None)
    truncated_normal.sample_backward(torch.ones_like(action), head, whole(noise, 1), 0.1, gradient)
    assert action.abs().max() <= 1 - 1e-6 + 1e-7
    assert gradient.isfinite().all()
    assert gradient.abs().max() <= 2  # an action moves by no more than loc does, and by twice the scale's slope


def test_tiles_do_not_depend_on_the_last_row() -> None:
    """A handful of tiles in all, whatever the number of rows."""
    pytest.importorskip("triton")
    from apv_fast.kernels.parts.tiling import FEW_ROWS, TILES, choose_tile

    for kind in TILES:
        chosen = {choose_tile(rows, columns, kind, 132) for rows in range(1, 3000, 7) for columns in (400, 1024, 3072)}
        assert chosen <= {*TILES[kind], FEW_ROWS[kind]}
        assert choose_tile(2500, 3072, kind, 132) == TILES[kind][0]
        assert choose_tile(1, 3072, kind, 132) == FEW_ROWS[kind]

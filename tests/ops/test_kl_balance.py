"""The balanced KL loss on every backend: values of torch.distributions, gradients where they belong, free nats."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apv_fast.backend import IMPLEMENTATIONS, probe
from apv_fast.ops import kl_balance, kl_balance_normal
from tests.ops.kl_balance_problems import KINDS, SETTINGS, call, check, expected_loss, inputs
from tests.support.yardstick import VARIATION, judge

KIND_BACKENDS = [(kind, name) for kind, op in KINDS.items() for name in IMPLEMENTATIONS[op] if probe(name).available]
both = pytest.mark.parametrize(("kind", "backend"), KIND_BACKENDS)


@pytest.mark.interpreted("0.8")
@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("forward", [False, True], ids=["backward", "forward"])
@pytest.mark.parametrize("balance", [0.0, 0.5, 0.8, 1.0])
def test_against_torch_distributions(
    kind: str, backend: str, balance: float, forward: bool, dtype: torch.dtype
) -> None:
    options = SETTINGS | {"balance": balance, "forward": forward}
    check(kind, backend, (3, 5, 2, 7), dtype, 0, options)


SIZES = [(1, 1, 1, 1), (2, 3, 5, 13), (2, 2, 33, 64), (1, 2, 3, 1024), (1, 2, 40, 100), (1, 1, 2, 600)]


@pytest.mark.statistical
@both
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_sizes(kind: str, backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """More than one tile of S, classes that fill a tile and that do not; see :func:`tests.support.yardstick.judge`."""

    def measure(seed: int) -> dict[str, tuple[float, float]]:
        leaves = inputs(kind, shape, dtype, seed, device=probe(backend).devices[-1])
        exact = tuple(x.detach().double().cpu().requires_grad_() for x in leaves)
        wanted = expected_loss(kind, exact, **SETTINGS)
        truth = [wanted.detach(), *torch.autograd.grad(wanted, exact)]
        errors: list[list[float]] = []
        for name in (backend, "reference"):
            loss, _ = call(kind, leaves, name, **SETTINGS)
            got = [loss.detach(), *torch.autograd.grad(loss, leaves)]
            pairs = zip(got, truth, strict=True)
            errors.append([torch.dist(a.double().cpu(), b).item() / (b.norm().item() or 1.0) for a, b in pairs])
        return {str(i): pair for i, pair in enumerate(zip(*errors, strict=True))}

    loss = torch.finfo(torch.float32).eps * (1 + shape[2])
    judge(measure, dtype, exact=False, floors={"0": loss})


def _spaced(tensor: Tensor) -> Tensor:
    """The same numbers, no dimension contiguous, NaN between them."""
    wide = tensor.new_full((*(2 * size for size in tensor.shape),), float("nan"))
    return wide[(slice(None, None, 2),) * tensor.dim()].copy_(tensor)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "spaced": _spaced,
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "classes apart": lambda x: x.transpose(2, -1).contiguous().transpose(2, -1),
    "expanded": lambda x: x[:, :1].expand_as(x),
}


@both
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(kind: str, backend: str, layout: str) -> None:
    """What contiguous copies give, but for the order of sums; each argument in a layout of its own."""
    leaves = inputs(kind, (3, 4, 3, 5), torch.float32, device=probe(backend).devices[-1])
    changed = [LAYOUTS[layout](x.detach()) if i % 2 == 0 else _spaced(x.detach()) for i, x in enumerate(leaves)]
    results = []
    for tensors in (changed, [x.contiguous() for x in changed]):
        again = tuple(x.requires_grad_() for x in tensors)
        loss, value = call(kind, again, backend, free=1.0, free_avg=False)
        results.append([loss, value, *torch.autograd.grad(loss, again)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)


@both
def test_cotangent(kind: str, backend: str) -> None:
    """Gradients scale with what is done to the loss afterwards, an expanded cotangent included."""
    leaves = inputs(kind, (2, 3, 2, 4), torch.float64, device=probe(backend).devices[-1])
    loss, _ = call(kind, leaves, backend)
    plain = torch.autograd.grad(loss, leaves, retain_graph=True)
    for factor, total in ((-2.5, -2.5 * loss), (3.0, loss.expand(3).sum())):
        got = torch.autograd.grad(total, leaves, retain_graph=True)
        for a, b in zip(got, plain, strict=True):
            torch.testing.assert_close(a, factor * b)


@both
def test_many_steps(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More steps than the kernel that adds them up takes at a time."""
    if backend == "triton":
        monkeypatch.setattr("apv_fast.kernels.kl_balance.FINISH", 16)
    leaves = inputs(kind, (9, 5, 1, 2), torch.float32, device=probe(backend).devices[-1])
    for free_avg in (True, False):
        loss, value = call(kind, leaves, backend, free=0.4, free_avg=free_avg)
        wanted = value.double().mean().clamp(min=0.4) if free_avg else value.double().clamp(min=0.4).mean()
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)


@both
def test_the_same_bits_every_time(kind: str, backend: str) -> None:
    leaves = inputs(kind, (2, 2, 3, 33), torch.float32, device=probe(backend).devices[-1])
    runs = []
    for _ in range(20):
        loss, value = call(kind, leaves, backend, free=1.0, free_avg=False)
        runs.append([loss, value, *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@both
@pytest.mark.parametrize("free_avg", [False, True])
def test_without_steps_or_variables(kind: str, backend: str, free_avg: bool) -> None:
    """No variables: no divergence. No steps: the mean of nothing, as PyTorch has it."""
    device = probe(backend).devices[-1]
    loss, value = call(kind, inputs(kind, (2, 3, 0, 4), torch.float32, device=device), backend, free_avg=free_avg)
    assert loss.item() == 0 and value.tolist() == [[0.0] * 3] * 2
    leaves = inputs(kind, (0, 3, 2, 4), torch.float32, device=device)
    loss, value = call(kind, leaves, backend, free_avg=free_avg)
    assert loss.isnan() and value.shape == (0, 3)
    assert [g.shape for g in torch.autograd.grad(loss, leaves)] == [leaf.shape for leaf in leaves]


@pytest.mark.statistical
@pytest.mark.interpreted
@both
@settings(max_examples=30, deadline=None, derandomize=not VARIATION)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(1, 9)),
    seed=st.integers(0, 2**31),
    balance=st.sampled_from([0.0, 0.2, 0.5, 0.8]),
    free=st.floats(0, 8),
    free_avg=st.booleans(),
    forward=st.booleans(),
)
def test_any_shape_and_setting(
    kind: str,
    backend: str,
    shape: tuple[int, ...],
    seed: int,
    balance: float,
    free: float,
    free_avg: bool,
    forward: bool,
) -> None:
    options = {"balance": balance, "free": free, "free_avg": free_avg, "forward": forward}
    check(kind, backend, shape, torch.float64, seed, options)


@both
@pytest.mark.parametrize("forward", [False, True], ids=["backward", "forward"])
@pytest.mark.parametrize("balance", [0.0, 1.0])
def test_gradients_go_only_where_they_should(kind: str, backend: str, balance: float, forward: bool) -> None:
    """Balance 1 trains the prior alone and 0 the posterior alone, forward or not."""
    leaves = inputs(kind, (2, 3, 2, 4), torch.float64, device=probe(backend).devices[-1])
    loss, _ = call(kind, leaves, backend, balance=balance, forward=forward)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    half = len(leaves) // 2
    trained = [any(g is not None and bool(g.any()) for g in side) for side in (gradients[:half], gradients[half:])]
    assert trained == [balance == 0.0, balance == 1.0]


@both
def test_free_nats(kind: str, backend: str) -> None:
    """Above every step: no gradient and the loss is the free nats; between the steps ``free_avg`` decides."""
    leaves = inputs(kind, (2, 3, 2, 4), torch.float64, device=probe(backend).devices[-1])
    _, value = call(kind, leaves, backend)
    ceiling = 2 * value.max().item()
    for free_avg in (True, False):
        loss, _ = call(kind, leaves, backend, free=ceiling, free_avg=free_avg)
        torch.testing.assert_close(loss.item(), ceiling)
        assert not any(g.any() for g in torch.autograd.grad(loss, leaves))
    middle = value.median().item()
    assert value.mean() > middle  # then the mean does not see the limit, and single steps do
    plain, _ = call(kind, leaves, backend, free=0.0)
    averaged, _ = call(kind, leaves, backend, free=middle, free_avg=True)
    single, _ = call(kind, leaves, backend, free=middle, free_avg=False)
    torch.testing.assert_close(averaged, plain)
    torch.testing.assert_close(single, value.clamp(min=middle).mean())
    assert single > plain


@both
def test_equal_distributions_cost_nothing(kind: str, backend: str) -> None:
    leaves = inputs(kind, (2, 3, 2, 4), torch.float32, device=probe(backend).devices[-1])
    half = len(leaves) // 2
    loss, value = call(kind, leaves[:half] * 2, backend)
    assert abs(loss.item()) < 1e-6 and value.abs().max() < 1e-6


@pytest.mark.parametrize("backend", [name for kind, name in KIND_BACKENDS if kind == "categorical"])
def test_extreme_logits_stay_finite(backend: str) -> None:
    post, prior = torch.tensor([200.0, -200.0]), torch.tensor([-200.0, 200.0])
    leaves = tuple(x[None, None, None].to(probe(backend).devices[-1]).requires_grad_() for x in (post, prior))
    loss, value = call("categorical", leaves, backend)
    torch.testing.assert_close(value.item(), 400.0)
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(loss, leaves))


@both
def test_opcheck_and_compilation(kind: str, backend: str) -> None:
    leaves = inputs(kind, (2, 3, 2, 4), torch.float32, device=probe(backend).devices[-1])
    overload = getattr(torch.ops.apv_fast, KINDS[kind]).default
    torch.library.opcheck(overload, (*leaves, 0.8, 1.0, False, False, backend))
    if backend != "reference":
        own = getattr(torch.ops.apv_fast, f"kl_balance_{backend}")
        torch.library.opcheck(own.default, (list(leaves), 0.2, 0.8, 1.0, False, True))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(kind, leaves, backend), call(kind, leaves, backend), strict=True):
        torch.testing.assert_close(got, want)
    torch.compiler.reset()


X = torch.zeros(2, 3, 4, 5)
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("categorical", {"post_logit": X[0]}, ValueError, "post_logit has shape (3, 4, 5); it must be [B, T, S, C]"),
    ("categorical", {"prior_logit": X[:, :2]}, ValueError, "prior_logit has shape (2, 2, 4, 5); it must be"),
    ("categorical", {"prior_logit": X.double()}, TypeError, "prior_logit has dtype torch.float64; it must be torch.fl"),
    ("categorical", {"prior_logit": X.to("meta")}, ValueError, "prior_logit is on meta; it must be on cpu"),
    ("categorical", {"post_logit": X.long()}, TypeError, "post_logit has dtype torch.int64; it must be a floating"),
    ("categorical", {"post_logit": None}, TypeError, "post_logit is a NoneType; it must be a torch.Tensor"),
    ("categorical", {"balance": 1.1}, ValueError, "balance is 1.1; it must be in [0, 1]"),
    ("categorical", {"free": -1.0}, ValueError, "free is -1.0; it must be at least 0 (nats)"),
    ("normal", {"post_std": X[..., :3, 0]}, ValueError, "post_std has shape (2, 3, 3); it must be [B, T, S] with"),
    ("normal", {"prior_mean": X[..., 0].half()}, TypeError, "prior_mean has dtype torch.float16"),
    ("normal", {"prior_std": X[..., 0].to("meta")}, ValueError, "prior_std is on meta"),
    ("normal", {"post_mean": X}, ValueError, "post_mean has shape (2, 3, 4, 5); it must be [B, T, S]"),
]


@pytest.mark.parametrize(("kind", "changed", "error", "message"), BAD)
def test_bad_input_names_the_argument(kind: str, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    op: Any = kl_balance if kind == "categorical" else kl_balance_normal
    good = {"post_logit": X, "prior_logit": X}
    if kind == "normal":
        good = {name: X[..., 0] + 1 for name in ("post_mean", "post_std", "prior_mean", "prior_std")}
    op(**good)
    with pytest.raises(error, match=re.escape(message)):
        op(**(good | changed))


@both
@pytest.mark.parametrize("free_avg", [True, False], ids=["mean", "per step"])
def test_a_divergence_of_exactly_the_free_nats_has_its_gradient(kind: str, backend: str, free_avg: bool) -> None:
    """As PyTorch's clamp has it."""
    leaves = inputs(kind, (1, 1, 3, 4), torch.float32, device=probe(backend).devices[-1])
    settings = {**SETTINGS, "free_avg": free_avg}
    _, value = call(kind, leaves, backend, **settings)
    gradients = []
    for free in (0.0, value.item()):
        loss, _ = call(kind, leaves, backend, **{**settings, "free": free})
        gradients.append(torch.autograd.grad(loss, leaves))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
        assert one.any()

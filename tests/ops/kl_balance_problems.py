"""Problems for ``kl_balance`` and ``kl_balance_normal``, and their definition by torch.distributions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributions

from apv_fast.backend import probe
from apv_fast.ops import kl_balance, kl_balance_normal
from tests.support.yardstick import seed_of

KINDS = {"categorical": "kl_balance", "normal": "kl_balance_normal"}

SETTINGS: dict[str, Any] = {"balance": 0.8, "free": 0.0, "free_avg": True, "forward": False}


def inputs(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """Leaves: two logits ``[B, T, S, C]``, or two means and standard deviations ``[B, T, S]``."""
    generator = torch.Generator().manual_seed(seed_of(seed))
    if kind == "categorical":
        tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    else:
        tensors = [torch.randn(shape[:-1], generator=generator, dtype=torch.float64) for _ in range(4)]
        tensors = [x if i % 2 == 0 else x.abs() + 0.2 for i, x in enumerate(tensors)]
    return tuple(x.to(device, dtype).requires_grad_() for x in tensors)


def call(kind: str, leaves: tuple[Tensor, ...], backend: str | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    op: Any = kl_balance if kind == "categorical" else kl_balance_normal
    result: tuple[Tensor, Tensor] = op(*leaves, backend=backend, **options)
    return result


def divergence(kind: str, p: tuple[Tensor, ...], q: tuple[Tensor, ...]) -> Tensor:
    """KL(p ‖ q) ``[B, T]`` by torch.distributions."""
    if kind == "categorical":
        make: Any = lambda x: distributions.Independent(distributions.OneHotCategorical(logits=x[0]), 1)  # noqa: E731
    else:
        make = lambda x: distributions.Independent(distributions.Normal(*x), 1)  # noqa: E731
    return distributions.kl_divergence(make(p), make(q))


def expected_loss(
    kind: str, leaves: tuple[Tensor, ...], balance: float, free: float, free_avg: bool, forward: bool
) -> Tensor:
    """Spelt out: the term that trains the posterior's side, and the one that trains the prior's."""
    half = len(leaves) // 2
    post, prior = leaves[:half], leaves[half:]
    stopped_post, stopped_prior = (tuple(x.detach() for x in side) for side in (post, prior))
    if balance == 0.5:
        value = divergence(kind, prior, post) if forward else divergence(kind, post, prior)
        return value.clamp(min=free).mean()
    if forward:
        terms = (balance, divergence(kind, prior, stopped_post)), (1 - balance, divergence(kind, stopped_prior, post))
    else:
        terms = (1 - balance, divergence(kind, post, stopped_prior)), (balance, divergence(kind, stopped_post, prior))
    loss = torch.zeros((), dtype=torch.float64)
    for weight, value in terms:
        limited = value.mean().clamp(min=free) if free_avg else value.clamp(min=free).mean()
        loss = loss + weight * limited
    return loss


def check(kind: str, backend: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int, options: Any) -> None:
    leaves = inputs(kind, shape, dtype, seed, probe(backend).devices[-1])
    loss, value = call(kind, leaves, backend, **options)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    exact = tuple(x.detach().double().cpu().requires_grad_() for x in leaves)
    wanted = expected_loss(kind, exact, **options)
    wanted_gradients = torch.autograd.grad(wanted, exact, allow_unused=True)
    half = len(exact) // 2
    sides = (exact[half:], exact[:half]) if options["forward"] else (exact[:half], exact[half:])
    assert all(g is None or g.dtype == dtype for g in gradients)
    assert loss.dtype == value.dtype == torch.promote_types(dtype, torch.float32)
    assert loss.shape == () and value.shape == shape[:2] and not value.requires_grad
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-5}[dtype]
    torch.testing.assert_close(loss.double().cpu(), wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(value.double().cpu(), divergence(kind, *sides).detach(), rtol=tolerance, atol=tolerance)
    rounding = max(tolerance, torch.finfo(dtype).eps)  # gradients come back in the inputs' dtype
    for got, want, leaf in zip(gradients, wanted_gradients, exact, strict=True):
        got, want = (torch.zeros_like(leaf) if g is None else g.double().cpu() for g in (got, want))
        torch.testing.assert_close(got, want, rtol=rounding, atol=rounding)

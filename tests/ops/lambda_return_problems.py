"""Problems for ``lambda_return``, and how exact backends are."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from apv_fast.backend import probe
from apv_fast.ops import lambda_return
from tests.support.yardstick import seed_of

NAMES = ("reward", "value", "discount", "bootstrap")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def device_of(backend: str) -> str:
    return probe(backend).devices[-1]


def inputs(
    shape: tuple[int, int], dtype: torch.dtype, device: str, *, seed: int = 0, positive: bool = False
) -> dict[str, Tensor]:
    """Leaves by name, and the returns' cotangent; ``positive`` excludes cancellation."""
    generator = torch.Generator().manual_seed(seed_of(seed))
    horizon, n = shape
    tensors = {name: torch.randn(horizon, n, generator=generator) for name in ("reward", "value", "cotangent")}
    tensors["bootstrap"] = torch.randn(n, generator=generator)
    if positive:
        tensors = {name: tensor.abs() for name, tensor in tensors.items()}
    tensors["discount"] = torch.rand(horizon, n, generator=generator)
    return {name: tensor.to(device, dtype) for name, tensor in tensors.items()}


def run(tensors: dict[str, Tensor], backend: str, lambda_: float = 0.95) -> dict[str, Tensor]:
    """Returns and gradients, by name."""
    leaves = [tensors[name].detach().requires_grad_() for name in NAMES]
    returns = lambda_return(*leaves, lambda_=lambda_, backend=backend)
    gradients = torch.autograd.grad(returns, leaves, tensors["cotangent"])
    return {"returns": returns.detach()} | {f"grad_{name}": g for name, g in zip(NAMES, gradients, strict=True)}


def truth(tensors: dict[str, Tensor], lambda_: float = 0.95) -> dict[str, Tensor]:
    """The same in float64, one number at a time, by the chain rule by hand."""
    r, v, d, g, b = (
        tensors[name].detach().double().cpu().numpy()
        for name in ("reward", "value", "discount", "cotangent", "bootstrap")
    )
    horizon, n = r.shape
    returns, grad_r, grad_v, grad_d, grad_b = (np.zeros_like(x) for x in (r, r, v, d, b))
    for j in range(n):
        following = [(v[t + 1, j] if t + 1 < horizon else b[j]) for t in range(horizon)]
        blend = np.zeros(horizon)
        last = b[j]
        for t in reversed(range(horizon)):
            blend[t] = (1 - lambda_) * following[t] + lambda_ * last
            last = returns[t, j] = r[t, j] + d[t, j] * blend[t]
        adjoint = 0.0  # of what row t contributes to row t - 1
        for t in range(horizon):
            total = g[t, j] + lambda_ * adjoint
            grad_r[t, j], grad_d[t, j], grad_v[t, j] = total, total * blend[t], (1 - lambda_) * adjoint
            adjoint = d[t, j] * total
        grad_b[j] = adjoint
    results = {"returns": returns, "grad_reward": grad_r, "grad_value": grad_v, "grad_discount": grad_d}
    return {name: torch.from_numpy(array) for name, array in (results | {"grad_bootstrap": grad_b}).items()}


def errors(results: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative error ‖a − b‖ / ‖b‖ of each; infinite where only the expected one is zero."""
    relative = {}
    for name, tensor in expected.items():
        distance, size = torch.dist(results[name].double().cpu(), tensor).item(), tensor.norm().item()
        relative[name] = distance / size if size else (np.inf if distance else 0.0)
    return relative


def assert_as_exact_as_reference(tensors: dict[str, Tensor], backend: str) -> None:
    """Error at most twice the reference's own in this dtype, counting it as half a unit in the last place or more.

    So a store may truncate, as Triton's interpreter (unlike a GPU) does to bfloat16, but an inexact sum may not hide.
    """
    dtype = tensors["reward"].dtype
    half_unit = torch.finfo(dtype).eps / 2
    expected = truth(tensors)
    results = run(tensors, backend)
    for name, tensor in results.items():
        assert tensor.dtype == dtype, name
        assert tensor.shape == expected[name].shape, name
    got, reference = errors(results, expected), errors(run(tensors, "reference"), expected)
    for name in expected:
        assert reference[name] <= 4 * half_unit, f"reference {name}: {reference[name]:.2e}"
        bound = 2 * max(reference[name], half_unit)
        assert got[name] <= bound, f"{name}: error {got[name]:.2e}, reference {reference[name]:.2e}, bound {bound:.2e}"

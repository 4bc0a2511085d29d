"""Keras' Adam against its formula in NumPy."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from apv_fast.optim import KerasAdam

SETTINGS: dict[str, Any] = {"lr": 0.05, "eps": 0.01, "clip": 3.0, "weight_decay": 0.02}


class NumpyAdam:
    """Clip by global norm, decay of every weight, Adam with ε beside the uncorrected √v; in that order."""

    def __init__(self, weights: list[np.ndarray], lr: float, eps: float, clip: float, weight_decay: float) -> None:
        self.w = [w.copy() for w in weights]
        self.m, self.v = ([np.zeros_like(w) for w in weights] for _ in range(2))
        self.lr, self.eps, self.clip, self.decay, self.t = lr, eps, clip, weight_decay, 0

    def step(self, grads: list[np.ndarray | None]) -> float:
        self.t += 1
        norm = float(np.sqrt(sum((g**2).sum() for g in grads if g is not None)))
        factor = self.clip / norm if norm > self.clip else 1.0
        rate = self.lr * np.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t)
        for i, g in enumerate(grads):
            self.w[i] = self.w[i] - self.decay * self.w[i]
            if g is not None:
                g = factor * g
                self.m[i] = 0.9 * self.m[i] + 0.1 * g
                self.v[i] = 0.999 * self.v[i] + 0.001 * g**2
                self.w[i] = self.w[i] - rate * self.m[i] / (np.sqrt(self.v[i]) + self.eps)
        return norm


def weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in ((3, 4), (5,), (2,))
    ]


def gradients(t: int, scale: float = 1.0) -> list[Tensor | None]:
    """Of step t; the last weight has none."""
    generator = torch.Generator().manual_seed(100 + t)
    return [scale * torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 4), (5,))] + [None]


def run(adam: KerasAdam, leaves: list[Tensor], steps: range, scale: float = 1.0) -> list[float]:
    norms = []
    for t in steps:
        for leaf, grad in zip(leaves, gradients(t, scale), strict=True):
            leaf.grad = grad
        norms.append(adam.step().item())
    return norms


@pytest.mark.parametrize("scale", [0.1, 10.0], ids=["unclipped", "clipped"])
def test_formula(scale: float) -> None:
    leaves = weights()
    expected = NumpyAdam([w.detach().numpy() for w in leaves], **SETTINGS)
    norms = run(KerasAdam(leaves, **SETTINGS), leaves, range(20), scale)
    wanted = [expected.step([None if g is None else g.numpy() for g in gradients(t, scale)]) for t in range(20)]
    np.testing.assert_allclose(norms, wanted, rtol=1e-12)
    assert all(norm > 3 for norm in norms) == (scale == 10.0)
    for leaf, want in zip(leaves, expected.w, strict=True):
        np.testing.assert_allclose(leaf.detach().numpy(), want, rtol=1e-12)


def test_weights_without_gradient_decay() -> None:
    leaves = weights()
    before = leaves[2].detach().clone()
    run(KerasAdam(leaves, **SETTINGS), leaves, range(3))
    torch.testing.assert_close(leaves[2].detach(), before * 0.98**3)


def test_epsilon_stands_beside_the_uncorrected_moment() -> None:
    """At the first step its effect is 1/√(1 − β₂) ≈ 32 times that in torch.optim.Adam."""
    leaf = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    leaf.grad = torch.full_like(leaf, 0.01)
    KerasAdam([leaf], lr=1.0, eps=0.01, weight_decay=0.0).step()
    root = 0.01 * 0.001**0.5
    assert leaf.item() == pytest.approx(-root / (root + 0.01), rel=1e-12)


def test_zero_rate_keeps_moments_and_decay_running() -> None:
    leaves, frozen = weights(), weights()
    adam, still = KerasAdam(leaves, **SETTINGS), KerasAdam(frozen, **SETTINGS)
    still.param_groups[0]["lr"] = 0.0
    run(adam, leaves, range(4))
    run(still, frozen, range(4))
    for leaf, start in zip(frozen, weights(), strict=True):
        torch.testing.assert_close(leaf.detach(), start.detach() * 0.98**4)
    for a, b in zip(leaves[:2], frozen[:2], strict=True):
        assert torch.equal(adam.state[a]["m"], still.state[b]["m"])
        assert torch.equal(adam.state[a]["v"], still.state[b]["v"])
    assert still.param_groups[0]["iteration"] == 4


def test_infinite_clip_and_zero_gradients() -> None:
    leaves = weights()
    expected = NumpyAdam([w.detach().numpy() for w in leaves], **(SETTINGS | {"clip": np.inf}))
    run(KerasAdam(leaves, **(SETTINGS | {"clip": float("inf")})), leaves, range(3), 1e6)
    for t in range(3):
        expected.step([None if g is None else g.numpy() for g in gradients(t, 1e6)])
    for leaf, want in zip(leaves, expected.w, strict=True):
        np.testing.assert_allclose(leaf.detach().numpy(), want, rtol=1e-12)
    still = weights()
    assert run(KerasAdam(still, weight_decay=0.0), still, range(2), 0.0) == [0.0, 0.0]
    assert all(torch.equal(a, b) for a, b in zip(still, weights(), strict=True))


def test_without_any_gradient() -> None:
    leaf = torch.ones(2, requires_grad=True)
    assert KerasAdam([leaf], weight_decay=0.5).step().item() == 0
    assert leaf.tolist() == [0.5, 0.5]


def test_a_restored_state_goes_on_bit_for_bit() -> None:
    leaves = weights()
    adam = KerasAdam(leaves, **SETTINGS)
    run(adam, leaves, range(5))
    again = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    resumed = KerasAdam(again, lr=1.0)
    resumed.load_state_dict(copy.deepcopy(adam.state_dict()))
    run(adam, leaves, range(5, 9))
    run(resumed, again, range(5, 9))
    assert all(torch.equal(a, b) for a, b in zip(leaves, again, strict=True))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0; it must be at least 0"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"weight_decay": float("nan")}, "weight_decay is nan"),
        ({"clip": 0.0}, "clip is 0.0; it must be positive"),
    ],
)
def test_errors(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"KerasAdam: {message}"):
        KerasAdam(weights(), **changed)


def test_closures_are_refused() -> None:
    with pytest.raises(ValueError, match="closure is not supported"):
        KerasAdam(weights()).step(lambda: 0.0)

"""Keras' Adam on every backend against its formula in NumPy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from apv_fast.agent.cuda_graph import optimizer_tensors
from apv_fast.backend import IMPLEMENTATIONS, probe
from apv_fast.optim import KerasAdam
from tests.support.recording_graph import RecordingGraph

BACKENDS = [name for name in IMPLEMENTATIONS["keras_adam"] if probe(name).available]
every = pytest.mark.parametrize("backend", BACKENDS)
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


def device_of(backend: str) -> str:
    return probe(backend).devices[-1]


def weights(backend: str = "reference") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device_of(backend)).requires_grad_()
        for shape in ((3, 4), (5,), (2,))
    ]


def gradients(t: int, scale: float = 1.0) -> list[Tensor | None]:
    """Of step t; the last weight has none."""
    generator = torch.Generator().manual_seed(100 + t)
    return [scale * torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 4), (5,))] + [None]


def run(adam: KerasAdam, leaves: list[Tensor], steps: range, scale: float = 1.0) -> list[float]:
    norms = []
    for t in steps:
        for leaf, grad in zip(leaves, gradients(t, scale), strict=True):
            leaf.grad = None if grad is None else grad.to(leaf.device)
        norms.append(adam.step().item())
    return norms


@every
@pytest.mark.parametrize("scale", [0.1, 10.0], ids=["unclipped", "clipped"])
def test_formula(backend: str, scale: float) -> None:
    leaves = weights(backend)
    expected = NumpyAdam([w.detach().cpu().numpy() for w in leaves], **SETTINGS)
    norms = run(KerasAdam(leaves, **SETTINGS, backend=backend), leaves, range(20), scale)
    wanted = [expected.step([None if g is None else g.numpy() for g in gradients(t, scale)]) for t in range(20)]
    np.testing.assert_allclose(norms, wanted, rtol=1e-12)
    assert all(norm > 3 for norm in norms) == (scale == 10.0)
    for leaf, want in zip(leaves, expected.w, strict=True):
        np.testing.assert_allclose(leaf.detach().cpu().numpy(), want, rtol=1e-12)


@every
def test_weights_without_gradient_decay(backend: str) -> None:
    leaves = weights(backend)
    before = leaves[2].detach().clone()
    run(KerasAdam(leaves, **SETTINGS, backend=backend), leaves, range(3))
    torch.testing.assert_close(leaves[2].detach(), before * 0.98**3)


@every
def test_moments_rest_while_there_is_no_gradient(backend: str) -> None:
    """A gradient that comes and goes; moments that rest do not decay, as they would with a gradient of zeros."""
    leaves = weights(backend)
    adam = KerasAdam(leaves, **SETTINGS, backend=backend)
    expected = NumpyAdam([w.detach().cpu().numpy() for w in leaves], **SETTINGS)
    for t in range(6):
        grads = gradients(t)
        grads[t % 3] = None
        grads[2] = torch.ones(2, dtype=torch.float64) if t % 2 else None
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = None if grad is None else grad.to(leaf.device)
        adam.step()
        expected.step([None if g is None else g.numpy() for g in grads])
    for leaf, want, m, v in zip(leaves, expected.w, expected.m, expected.v, strict=True):
        state = adam.state[leaf]
        for got, right in ((leaf.detach(), want), (state["m"], m), (state["v"], v)):
            np.testing.assert_allclose(got.cpu().numpy(), right, rtol=1e-12)


@every
def test_epsilon_stands_beside_the_uncorrected_moment(backend: str) -> None:
    """At the first step its effect is 1/√(1 − β₂) ≈ 32 times that in torch.optim.Adam."""
    leaf = torch.zeros(1, dtype=torch.float64, device=device_of(backend), requires_grad=True)
    leaf.grad = torch.full_like(leaf, 0.01)
    KerasAdam([leaf], lr=1.0, eps=0.01, weight_decay=0.0, backend=backend).step()
    root = 0.01 * 0.001**0.5
    assert leaf.item() == pytest.approx(-root / (root + 0.01), rel=1e-12)


@every
@pytest.mark.parametrize("in_place", [False, True], ids=["set", "in place"])
def test_zero_rate_keeps_moments_and_decay_running(backend: str, in_place: bool) -> None:
    leaves, frozen = weights(backend), weights(backend)
    adam, still = (KerasAdam(x, **SETTINGS, backend=backend) for x in (leaves, frozen))
    group = still.param_groups[0]
    if in_place:
        group["lr"].fill_(0.0)
    else:
        group["lr"] = 0.0
    run(adam, leaves, range(4))
    run(still, frozen, range(4))
    for leaf, start in zip(frozen, weights(backend), strict=True):
        torch.testing.assert_close(leaf.detach(), start.detach() * 0.98**4)
    for a, b in zip(leaves[:2], frozen[:2], strict=True):
        assert torch.equal(adam.state[a]["m"], still.state[b]["m"])
        assert torch.equal(adam.state[a]["v"], still.state[b]["v"])
    assert group["iteration"] == 4 and isinstance(group["lr"], Tensor)
    group["lr"] = SETTINGS["lr"]
    before = [leaf.detach().clone() for leaf in frozen]
    run(still, frozen, range(4, 5))
    assert not torch.equal(frozen[0].detach(), before[0] * 0.98)


@every
def test_infinite_clip_and_zero_gradients(backend: str) -> None:
    leaves = weights(backend)
    expected = NumpyAdam([w.detach().cpu().numpy() for w in leaves], **(SETTINGS | {"clip": np.inf}))
    run(KerasAdam(leaves, **(SETTINGS | {"clip": float("inf")}), backend=backend), leaves, range(3), 1e6)
    for t in range(3):
        expected.step([None if g is None else g.numpy() for g in gradients(t, 1e6)])
    for leaf, want in zip(leaves, expected.w, strict=True):
        np.testing.assert_allclose(leaf.detach().cpu().numpy(), want, rtol=1e-12)
    still = weights(backend)
    assert run(KerasAdam(still, weight_decay=0.0, backend=backend), still, range(2), 0.0) == [0.0, 0.0]
    assert all(torch.equal(a, b) for a, b in zip(still, weights(backend), strict=True))


@every
def test_without_any_gradient(backend: str) -> None:
    leaf = torch.ones(2, device=device_of(backend), requires_grad=True)
    empty = torch.ones(0, device=device_of(backend), requires_grad=True)
    adam = KerasAdam([leaf, empty], eps=0.0, weight_decay=0.5, backend=backend)
    assert adam.step().item() == 0
    assert leaf.tolist() == [0.5, 0.5]
    nothing = KerasAdam([empty], backend=backend)
    assert nothing.step().item() == 0 and nothing.state_dict()["param_groups"][0]["iteration"] == 1


def many_layouts(backend: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Callable[[int], None]]:
    """Weights of many sizes and layouts, and what gives them gradients: unaligned, transposed, None."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, 1500), (4096,), (4097,), (2, 3, 4, 5), (1,), (), *[(2, n) for n in range(1, 66)]]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    leaves = [x.to(device_of(backend), dtype) for x in tensors]
    leaves[3] = leaves[3].contiguous(memory_format=torch.channels_last)
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def differentiate(t: int) -> None:
        source = torch.Generator().manual_seed(100 + t)
        for i, leaf in enumerate(leaves):
            wide = torch.randn(leaf.numel() + 1, generator=source, dtype=torch.float64).to(leaf)
            leaf.grad = wide[i % 2 : leaf.numel() + i % 2].view(leaf.shape)  # every second one is not aligned
        leaves[4 + t % 60].grad = None

    return leaves, differentiate


@every
def test_weights_of_any_size_and_layout(backend: str) -> None:
    """More weights than a table launch takes, more chunks than one; errors: at most twice the reference's own."""
    results = {}
    for name, dtype in (("reference", torch.float64), ("reference", torch.float32), (backend, torch.float32)):
        leaves, differentiate = many_layouts(name, dtype)
        adam = KerasAdam(leaves, **(SETTINGS | {"clip": 20.0}), backend=name)
        norms = []
        for t in range(3):
            differentiate(t)
            norms.append(adam.step())
        moments = [[adam.state[leaf][kind] for leaf in leaves] for kind in "mv"]
        groups = [norms, leaves, *moments]
        results[name, dtype] = [torch.cat([x.detach().double().cpu().flatten() for x in group]) for group in groups]
    rounding = torch.finfo(torch.float32).eps / 2
    truth, reference = results["reference", torch.float64], results["reference", torch.float32]
    for right, own, got in zip(truth, reference, results[backend, torch.float32], strict=True):
        bound = 2 * max(torch.dist(own, right).item(), rounding * right.norm().item())
        assert torch.dist(got, right).item() <= bound


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "triton"])
def test_more_chunks_than_programs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of the norm takes several chunks, aligned ones and others."""
    for name, value in (("CHUNK", 8), ("PROGRAMS", 4)):
        monkeypatch.setattr(f"apv_fast.kernels.keras_adam.{name}", value)
    leaves = [torch.randn(n, dtype=torch.float64, device=device_of(backend)).requires_grad_() for n in (37, 32, 3)]
    expected = NumpyAdam([w.detach().cpu().numpy() for w in leaves], **SETTINGS)
    adam = KerasAdam(leaves, **SETTINGS, backend=backend)
    for _ in range(2):
        for leaf in leaves:
            leaf.grad = torch.randn_like(leaf)
        norm = expected.step([leaf.grad.cpu().numpy() for leaf in leaves if leaf.grad is not None])
        assert adam.step().item() == pytest.approx(norm, rel=1e-12)
    for leaf, want in zip(leaves, expected.w, strict=True):
        np.testing.assert_allclose(leaf.detach().cpu().numpy(), want, rtol=1e-12)


@every
def test_the_same_bits_every_time(backend: str) -> None:
    runs = []
    for _ in range(20 if backend != "triton" or device_of(backend) == "cuda" else 4):
        leaves, differentiate = many_layouts(backend)
        adam = KerasAdam(leaves, **SETTINGS, backend=backend)
        differentiate(0)
        runs.append([adam.step(), *leaves])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@every
def test_a_restored_state_goes_on_bit_for_bit(backend: str) -> None:
    leaves = weights(backend)
    adam = KerasAdam(leaves, **SETTINGS, backend=backend)
    run(adam, leaves, range(5))
    again = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    resumed = KerasAdam(again, lr=1.0, backend=backend)
    resumed.load_state_dict(copy.deepcopy(adam.state_dict()))
    run(adam, leaves, range(5, 9))
    run(resumed, again, range(5, 9))
    assert all(torch.equal(a, b) for a, b in zip(leaves, again, strict=True))


@every
def test_a_copy_goes_on_by_itself(backend: str) -> None:
    """Of the whole optimiser: it has weights, moments, rate and clock of its own."""
    leaves = weights(backend)
    adam = KerasAdam(leaves, **SETTINGS, backend=backend)
    run(adam, leaves, range(3))
    twin = copy.deepcopy(adam)
    copies = twin.param_groups[0]["params"]
    before = [leaf.detach().clone() for leaf in leaves]
    run(twin, copies, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))
    run(adam, leaves, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(leaves, copies, strict=True))


@every
def test_state_is_what_older_versions_wrote_and_read(backend: str) -> None:
    """Plain numbers, moments by weight; a weight that never had a gradient may have none."""
    leaves = weights(backend)
    adam = KerasAdam(leaves, **SETTINGS, backend=backend)
    run(adam, leaves, range(2))
    state = adam.state_dict()
    assert {name: type(value) for name, value in state["param_groups"][0].items()} == {
        **dict.fromkeys(("lr", "eps", "clip", "weight_decay"), float),
        **{"betas": tuple, "iteration": int, "params": list},
    }
    assert [sorted(state["state"][i]) for i in range(3)] == [["m", "v"]] * 3
    del state["state"][2]
    again = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    resumed = KerasAdam(again, backend=backend)
    again[2].grad = torch.ones_like(again[2])
    resumed.step()  # moments that the checkpoint does not have
    with torch.no_grad():
        again[2].copy_(leaves[2])
    resumed.load_state_dict(state)
    assert not resumed.state[again[2]]["m"].any() and resumed.param_groups[0]["iteration"] == 2


@every
def test_weights_may_move(backend: str) -> None:
    """Into other memory, as ``module.to`` and ``p.data = ...`` do."""
    leaves, others = weights(backend), weights(backend)
    adam, moving = (KerasAdam(x, **SETTINGS, backend=backend) for x in (leaves, others))
    for t in range(3):
        for leaf in others:
            leaf.data = leaf.data.clone()
        run(adam, leaves, range(t, t + 1))
        run(moving, others, range(t, t + 1))
    assert all(torch.equal(a, b) for a, b in zip(leaves, others, strict=True))


@every
def test_autograd_notices_the_step(backend: str) -> None:
    """A backward through weights that a step has changed is an error, not a wrong gradient."""
    (leaf, *_) = leaves = weights(backend)
    adam = KerasAdam(leaves, **SETTINGS, backend=backend)
    loss = leaf.square().sum()
    loss.backward(retain_graph=True)
    adam.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if device_of(name) == "cpu" and name != "triton"])
def test_a_recorded_step_repeats_with_other_rates_and_clocks(backend: str) -> None:
    """What a CUDA graph would freeze is a tensor: the rate, the count of steps, the correction of the moments."""
    leaves, others = weights(backend), weights(backend)
    adam, recorded = (KerasAdam(x, **SETTINGS, backend=backend) for x in (leaves, others))
    for leaf, grad in zip(others, gradients(0), strict=True):
        leaf.grad = grad
    replay = RecordingGraph(lambda: optimizer_tensors(recorded)).record(recorded.step)
    for t, rate in enumerate((0.05, 0.0, 0.1)):
        adam.param_groups[0]["lr"] = rate
        run(adam, leaves, range(t, t + 1))
        for leaf, grad in zip(others, gradients(t), strict=True):
            if leaf.grad is not None and grad is not None:
                leaf.grad.copy_(grad)
        recorded.param_groups[0]["lr"].fill_(rate)
        replay()
    assert all(torch.equal(a, b) for a, b in zip(leaves, others, strict=True))
    assert recorded.param_groups[0]["iteration"] == 3


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


def test_more_than_one_group_is_refused() -> None:
    with pytest.raises(ValueError, match="KerasAdam: params has more than one group"):
        KerasAdam([{"params": weights()[:1]}, {"params": weights()[1:]}])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="KerasAdam: params has more than one group"):
        KerasAdam(weights()).add_param_group({"params": weights()})


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton")
def test_weights_that_the_kernel_does_not_take() -> None:
    device = device_of("triton")
    half, wide = (torch.ones(2, dtype=dtype, device=device) for dtype in (torch.bfloat16, torch.float64))
    gaps = torch.ones(4, device=device)[::2]
    with pytest.raises(TypeError, match=r"weight 0 has dtype torch\.bfloat16; .*backend='reference' takes others"):
        KerasAdam([half], backend="triton")
    with pytest.raises(TypeError, match=r"weight 1 has dtype torch\.float64; all must be float32"):
        KerasAdam([torch.ones(2, device=device), wide], backend="triton")
    with pytest.raises(ValueError, match=r"weight 0 has strides \(2,\); it must be without gaps or overlaps"):
        KerasAdam([gaps], backend="triton")


def test_closures_are_refused() -> None:
    with pytest.raises(ValueError, match="closure is not supported"):
        KerasAdam(weights()).step(lambda: 0.0)

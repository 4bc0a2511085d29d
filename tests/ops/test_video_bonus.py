"""``video_bonus`` on every backend, against a queue kept in float64; and what only the Triton kernels have."""

from __future__ import annotations

import re
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from apv_fast.backend import IMPLEMENTATIONS, probe
from apv_fast.nn import VideoBonus
from apv_fast.ops import knn_bonus, video_bonus
from tests.support.yardstick import judge, least, seed_of, yardsticks

BACKENDS = [name for name in IMPLEMENTATIONS["video_bonus"] if probe(name).available]
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason=f"triton: {probe('triton').reason}")
Results = list[tuple[Tensor, Tensor, int]]  # of each call: bonus, queue, rows in it
Exact = list[tuple[np.ndarray, np.ndarray, int]]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
SIZES = {  # B, T, F, d, window, N, k; three calls in a row
    "filling": (3, 5, 6, 4, 3, 40, 3),  # 9 windows a call
    "overfull": (3, 5, 6, 4, 3, 7, 3),  # more windows than the queue holds
    "few": (2, 4, 5, 3, 2, 50, 16),  # fewer rows than k at first
    "one": (2, 3, 5, 2, 1, 1, 1),
    "wide": (4, 9, 33, 70, 4, 60, 5),
}


def device_of(backend: str) -> str:
    return probe(backend).devices[-1]


def tensors(
    size: str, dtype: torch.dtype, backend: str, calls: int = 3, seed: int = 0
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Features of some calls, and the other arguments."""
    batch, steps, width, d, _, n, _ = SIZES[size]
    generator = torch.Generator().manual_seed(seed_of(seed))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device_of(backend), dtype)

    feats = [normal(batch, steps, width) + 1 for _ in range(calls)]
    queue = torch.zeros(n, d, device=device_of(backend), dtype=dtype)
    filled = torch.zeros((), device=device_of(backend), dtype=torch.int64)
    return feats, {"projection": normal(width, d) / 8, "queue": queue, "filled": filled}


def run(
    size: str, dtype: torch.dtype, backend: str, feats: list[Tensor], state: dict[str, Tensor], **options: Any
) -> Results:
    """Bonus, queue and count after each call, on the CPU."""
    queue, filled = state["queue"], state["filled"]
    results = []
    for feat in feats:
        bonus, queue, filled = video_bonus(
            feat, state["projection"], queue, filled,
            window=SIZES[size][4], k=SIZES[size][6], backend=backend, **options,
        )  # fmt: skip
        assert (bonus.dtype, queue.dtype, filled.dtype, filled.dim()) == (dtype, dtype, torch.int64, 0)
        assert queue.is_contiguous() and queue.data_ptr() != state["queue"].data_ptr()
        results.append((bonus.cpu(), queue.cpu(), int(filled)))
    return results


def truth(size: str, feats: list[Tensor], projection: Tensor, reduce: str, exclude_self: bool) -> Exact:
    """The same with a float64 list as the queue, newest first."""
    _, _, _, d, window, n, k = SIZES[size]
    rows = np.zeros((0, d))
    results = []
    for feat in feats:
        f = feat.double().cpu().numpy()
        new = np.array([x[t : t + window].mean(0) for x in f for t in range(len(x) - window + 1)])
        new = new @ projection.double().cpu().numpy()
        rows = np.concatenate([new, rows])[:n]
        distance = np.linalg.norm(new[:, None] - rows, axis=-1)
        if exclude_self:
            np.fill_diagonal(distance, np.inf)
        nearest = [np.sort(row[np.isfinite(row)])[:k] for row in distance]
        bonus = [(x.mean() if reduce == "mean" else x[-1]) if len(x) else 0.0 for x in nearest]
        results.append((np.array(bonus).reshape(len(f), -1), rows, len(rows)))
    return results


@pytest.mark.statistical
@pytest.mark.parametrize(("reduce", "exclude_self"), [("mean", False), ("mean", True), ("kth", True)])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_successive_calls(
    backend: str, dtype: torch.dtype, size: str, reduce: Literal["mean", "kth"], exclude_self: bool
) -> None:
    """Errors of bonus and queue, three calls together; see :func:`tests.support.yardstick.judge`."""
    options: dict[str, Any] = {"reduce": reduce, "exclude_self": exclude_self}

    def measure(seed: int) -> dict[str, tuple[float, float]]:
        feats, state = tensors(size, dtype, backend, seed=seed)
        got = run(size, dtype, backend, feats, state, **options)
        plain = yardsticks(lambda: run(size, dtype, "reference", feats, state, **options), backend)
        expected = truth(size, feats, state["projection"], reduce, exclude_self)
        assert not state["filled"] and not state["queue"].any(), "the arguments are left as they are"
        for (_, queue, filled), (_, _, count) in zip(got, expected, strict=True):
            assert filled == count
            assert not queue[count:].any(), "what is not filled stays zero"
        ours, *others = (relative_errors(results, expected) for results in (got, *plain))
        own = least(others)
        assert max(own.values()) <= 100 * torch.finfo(dtype).eps, "the reference itself"
        return {name: (error, own[name]) for name, error in ours.items()}

    judge(measure, dtype, exact=False)


def relative_errors(results: Results, expected: Exact) -> dict[str, float]:
    """Of all calls' bonuses, and of all queues."""
    bonuses = [(bonus.double().numpy(), want) for (bonus, _, _), (want, _, _) in zip(results, expected, strict=True)]
    both = zip(results, expected, strict=True)
    queues = [(queue.double().numpy()[: len(rows)], rows) for (_, queue, _), (_, rows, _) in both]
    errors = {}
    for name, pairs in (("bonus", bonuses), ("queue", queues)):
        assert all(got.shape == want.shape for got, want in pairs), name
        size = np.linalg.norm([np.linalg.norm(want) for _, want in pairs])
        errors[name] = float(np.linalg.norm([np.linalg.norm(got - want) for got, want in pairs]) / size)
    return errors


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend: str) -> None:
    """Features, projection and queue in another layout give the same bits."""
    feats, state = tensors("wide", torch.float32, backend, calls=2)
    expected = run("wide", torch.float32, backend, feats, state)
    strided = {name: x.mT.contiguous().mT if x.dim() else x for name, x in state.items()}
    wide = [torch.stack([x, x + 1], -1)[..., 0] for x in feats]
    assert not wide[0].is_contiguous()
    for ours, theirs in zip(run("wide", torch.float32, backend, wide, strided), expected, strict=True):
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_queue_moves_bit_for_bit(backend: str) -> None:
    feats, state = tensors("filling", torch.float32, backend, calls=1)
    state["queue"] = torch.randn_like(state["queue"])
    state["filled"] = state["filled"] + 37
    ((_, queue, filled),) = run("filling", torch.float32, backend, feats, state)
    assert torch.equal(queue[9:], state["queue"][:-9].cpu())
    assert filled == 40


class NoSync(TorchDispatchMode):
    """Refuses whatever makes the host wait for a number of the device, and shapes that depend on one."""

    FORBIDDEN = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.FORBIDDEN:
            raise AssertionError(f"{func} makes the host wait")
        return func(*args, **(kwargs or {}))


def test_the_mode_sees_a_sync() -> None:
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSync():  # type: ignore[no-untyped-call]
        int(torch.ones((), dtype=torch.int64))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "cpu"])
def test_no_host_sync(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module's whole forward, also inside what is an opaque op otherwise."""
    bonus = VideoBonus(6, queue_size=30, projection_dim=4, k=3, window=3, backend=backend).to(device_of(backend))
    feat = torch.randn(3, 5, 6, device=device_of(backend))
    expected = [bonus(feat) for _ in range(2)]
    for buffer in (bonus.queue, bonus.filled):
        buffer.zero_()
    if backend == "triton":
        from apv_fast.kernels import video_bonus as module

        monkeypatch.setattr(module.video_bonus, "op", module.video_bonus._forward)
    with NoSync():  # type: ignore[no-untyped-call]
        results = [bonus(feat) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration(backend: str) -> None:
    (feat,), state = tensors("filling", torch.float32, backend, calls=1)
    arguments = (feat, *state.values(), 3, 4, "mean", False)
    torch.library.opcheck(torch.ops.apv_fast.video_bonus.default, (*arguments, backend))
    if backend != "reference":
        torch.library.opcheck(getattr(torch.ops.apv_fast, f"video_bonus_{backend}").default, (*arguments, False))
    leaf = feat.clone().requires_grad_()
    outputs = video_bonus(leaf, *state.values(), window=3, backend=backend)
    assert not any(output.requires_grad for output in outputs)
    compiled = torch.compile(video_bonus, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(feat, *state.values(), window=3, backend=backend), outputs, strict=True):
        torch.testing.assert_close(ours, theirs)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank": ({"af_feat": torch.zeros(4, 6)}, ValueError, r"af_feat has shape (4, 6); it must be [B, T, F]"),
    "width": ({"projection": torch.zeros(5, 4)}, ValueError, "projection has shape (5, 4); it must be [F, d] with F=6"),
    "queue": ({"queue": torch.zeros(9, 3)}, ValueError, "queue has shape (9, 3); it must be [N, d] with d=4"),
    "queue's dtype": ({"queue": torch.zeros(9, 4).double()}, TypeError, "queue has dtype torch.float64"),
    "empty": ({"queue": torch.zeros(0, 4)}, ValueError, "queue has no rows; it must have at least one"),
    "filled": ({"filled": torch.zeros(1, dtype=torch.int64)}, ValueError, "filled has shape (1,); it must be []"),
    "filled's dtype": (
        {"filled": torch.zeros(())},
        TypeError,
        "filled has dtype torch.float32; it must be torch.int64",
    ),
    "window": ({"window": 0}, ValueError, "window is 0; it must be at least 1"),
    "steps": ({"window": 6}, ValueError, "af_feat has 5 steps; it must have at least 6"),
    "k": ({"k": 0}, ValueError, "k is 0; it must be at least 1"),
    "reduce": ({"reduce": "max"}, ValueError, "reduce is 'max'; it must be 'mean' or 'kth'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case: str) -> None:
    changed, error, message = BAD[case]
    good = {"af_feat": torch.zeros(2, 5, 6), "projection": torch.zeros(6, 4), "queue": torch.zeros(9, 4)}
    with pytest.raises(error, match=re.escape(f"video_bonus: {message}")):
        video_bonus(**(good | {"filled": torch.zeros((), dtype=torch.int64)} | changed))


# The Triton kernels: the filter may only rule out what it can prove, and has to prove something.


def chunks(seed: int, n: int, d: int) -> Tensor:
    """Rows like those of training: runs of 20 successive windows, near each other, far from other runs, offset."""
    generator = torch.Generator().manual_seed(seed)
    runs = torch.randn(-(-n // 20), 1, d, generator=generator)
    steps = 0.1 * torch.randn(len(runs), 20, d, generator=generator).cumsum(1)
    return (runs + steps).flatten(0, 1)[:n] + 100


BLOCKS = {
    "GPU": dict(filter_m=64, filter_n=64, rounds=3, splits=4, verify=1, scan_q=4, scan_n=32),
    "tiny": dict(filter_m=32, filter_n=16, rounds=2, splits=3, verify=2, scan_q=2, scan_n=16),  # a tile fills a list
    "own": None,
}


@needs_triton
@pytest.mark.parametrize("blocks", BLOCKS)
def test_filter_proves_all_of_ordinary_rows(blocks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from apv_fast.kernels import knn_bonus as module

    if BLOCKS[blocks]:
        monkeypatch.setattr(module, "blocks", lambda: BLOCKS[blocks])
    keys = chunks(0, 200, 33).to(device_of("triton"))
    query = keys[:66]
    result = query.new_empty(len(query))
    unproven = module._filtered(query, keys, None, result, 5, 1, False)
    assert not unproven.any()
    torch.testing.assert_close(result, knn_bonus(query, keys, k=5, backend="reference"))


@needs_triton
def test_what_the_filter_cannot_prove_is_scanned() -> None:
    """A tight cluster in a tile with far queries: rounding hides which of its many keys are the nearest."""
    from apv_fast.kernels import knn_bonus as module

    generator = torch.Generator().manual_seed(0)
    far = torch.randn(200, 8, generator=generator)
    cluster = 3 + 1e-4 * torch.randn(100, 8, generator=generator)
    keys = torch.cat([far, cluster]).to(device_of("triton"))
    query = keys[[*range(0, 40), *range(200, 220)]]
    result = query.new_empty(len(query))
    unproven = module._filtered(query, keys, None, result, 16, 1, False).bool()
    assert unproven[40:].all() and not unproven[:40].all()
    torch.testing.assert_close(
        knn_bonus(query, keys, k=16, backend="triton"),
        knn_bonus(query, keys, k=16, backend="reference"),
        rtol=1e-5,
        atol=0,
    )


@needs_triton
@pytest.mark.parametrize("scale", [1e-18, 1e-3, 1.0, 1e17])
@pytest.mark.parametrize("d", [1, 128, 256])
def test_bound_holds_when_tf32_truncates(d: int, scale: float) -> None:
    """The filter's bound with every operand cut to tf32, where that errs most: all products positive, all bits set."""
    from apv_fast.kernels.parts.knn_select import HUGE, SHRINK, TINY

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(100, d, generator=generator).add(0.5).mul(scale) for _ in range(2))
    a = (a.view(torch.int32) | 0x1FFF).view(torch.float32)  # what truncation takes from a number is as much as can be
    b = torch.where(torch.rand(100, 1, generator=generator) < 0.5, a * 1.001, b)
    a_cut, b_cut = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
    norms = [x.square().sum(-1) for x in (a, b)]
    bound = (norms[0] * SHRINK.value - TINY.value)[:, None] + norms[1] * SHRINK.value - 2 * (a_cut @ b_cut.T)
    bound = bound.where((bound > 0) & (bound < HUGE.value), 0)
    exact = (a.double()[:, None] - b.double()).square().sum(-1)
    assert (bound <= exact * (1 + 1e-6)).all()
    plain = norms[0][:, None] + norms[1] - 2 * (a_cut @ b_cut.T)
    assert (plain > exact * (1 + 1e-6)).any(), "without the margin it would not hold"

"""The CUDA scan's source on the CPU: the kernels run on an emulator, fiber by fiber, against the reference.

What this cannot show: the order in which a GPU makes writes visible, and what nvcc makes of the source.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from apv_fast.backend import BackendError
from apv_fast.cuda.parts.library import Library
from apv_fast.cuda.parts.recurrence import CudaScan
from apv_fast.recurrence.phases import (
    ScanInputs,
    ScanStart,
    ScanWeights,
    TraceGrads,
    sample_latent,
    sample_latent_backward,
)
from apv_fast.recurrence.plain import PlainScan
from apv_fast.reference.noise import gumbel_noise, normal_noise, philox, whole_noise
from apv_fast.types import Latent
from tests.support.cuda_emulator import AMPLE
from tests.support.rssm_cases import SIZES, EqualSizes, Sizes
from tests.support.rssm_contract import RSSMOp
from tests.support.rssm_errors import assert_exact


@pytest.mark.parametrize("sample", [True, False], ids=["sample", "mode"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
def test_values_and_gradients(emulate: Callable[..., CudaScan], sizes: Sizes, sample: bool) -> None:
    if not sample and sizes.discrete:
        pytest.skip("rounding decides which class is the mode")
    assert_exact("observe", "emulated", sizes, torch.bfloat16, sample)


@pytest.mark.parametrize("sizes", [SIZES["odd"], EqualSizes(2, 3, 8, 4, 4, 16, 16, 4, 8)], ids=["odd", "equal"])
@pytest.mark.parametrize("concat_embed", [False, True])
def test_stacked(emulate: Callable[..., CudaScan], concat_embed: bool, sizes: Sizes) -> None:
    assert_exact("stacked_concat" if concat_embed else "stacked", "emulated", sizes, torch.bfloat16, True)


@pytest.mark.parametrize("check", ["any_strides", "opcheck", "compiles_without_graph_break", "fake_tensors"])
def test_as_an_op(emulate: Callable[..., CudaScan], check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests of all backends ask of an op that runs here."""
    more = (monkeypatch,) if check == "opcheck" else ()
    getattr(RSSMOp(), f"test_{check}")("observe", "emulated", *more)


Problem = tuple[ScanWeights, ScanInputs, ScanStart, TraceGrads, Latent]


def problem(sizes: tuple[int, ...], noise: str = "given", seed: int = 0, gap: int = 3) -> Problem:
    """A core's arguments, weights with a gap between their rows, and gradients for its results."""
    batch, length, deter, hidden, stoch, discrete = sizes
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def weight(rows: int, columns: int) -> Tensor:
        wide = torch.full((rows, columns + gap), math.nan).bfloat16()
        return wide[:, :columns].copy_(randn(rows, columns) / columns**0.5)

    def vector(size: int, middle: float = 0) -> Tensor:
        return (middle + 0.3 * randn(size)).bfloat16()

    sample, stats = stoch * (discrete or 1), stoch * (discrete or 2)
    weights = ScanWeights(
        weight(hidden, sample),
        weight(3 * deter, hidden + deter),
        *(vector(3 * deter), vector(3 * deter, 1), vector(3 * deter)),
        *(weight(hidden, deter), weight(stats, hidden), vector(stats)),
    )
    inputs = ScanInputs(randn(batch, length, hidden).bfloat16(), randn(batch, length, hidden).bfloat16())
    fixed = 100 * randn(batch, length, stoch, discrete) if discrete else randn(batch, length, stoch)
    start = ScanStart(
        torch.rand(batch, length, generator=generator) > 0.3,
        randn(batch, deter).tanh(),
        {"seed": torch.tensor(-(2**45) + 7), "given": fixed, "mode": None}[noise],
    )
    # Small ones of the statistics, beside which what comes through the samples is large.
    grads = TraceGrads(randn(batch, length, deter), randn(batch, length, sample), 0.02 * randn(batch, length, stats))
    return weights, inputs, start, grads, Latent(stoch, discrete)


def results(core: CudaScan | PlainScan, case: Problem) -> dict[str, Tensor]:
    weights, inputs, start, grads, latent = case
    trace = core.forward(weights, inputs, start, latent)
    back = core.backward(weights, start, trace, grads, latent)
    return trace._asdict() | {f"grad {name}": x for name, x in back._asdict().items()}


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To a few roundings to bfloat16, by each tensor's size."""
    for name, want in expected.items():
        assert got[name].shape == want.shape and got[name].dtype == want.dtype and got[name].is_contiguous(), name
        error = torch.dist(got[name].float(), want.float()) / want.float().norm().clamp(min=1e-6)
        assert error < 0.01, f"{name}: {error:.1e}"


CORES = {  # B, T, D, H, S, C
    "two row tiles": (17, 2, 24, 40, 3, 9),
    "four row tiles": (33, 2, 9, 17, 2, 5),
    "two launches": (66, 2, 8, 9, 2, 3),
    "many classes": (2, 2, 16, 24, 2, 43),
    "steps of 32": (2, 3, 32, 64, 4, 8),
    "gaussian": (18, 2, 40, 33, 9, 0),
}


@pytest.mark.parametrize("sizes", CORES.values(), ids=list(CORES))
def test_core(emulate: Callable[..., CudaScan], sizes: tuple[int, ...]) -> None:
    case = problem(sizes)
    assert_close(results(emulate(), case), results(PlainScan(), case))


@pytest.mark.parametrize("sizes", [CORES["two launches"], CORES["gaussian"]], ids=["two launches", "gaussian"])
def test_a_seed_stands_for_its_noise(emulate: Callable[..., CudaScan], sizes: tuple[int, ...]) -> None:
    weights, inputs, start, grads, latent = problem(sizes, noise="seed")
    noise = whole_noise(start.noise, sizes[:2], latent, torch.float32)
    core = emulate()
    seeded = results(core, (weights, inputs, start, grads, latent))
    assert_close(seeded, results(core, (weights, inputs, start._replace(noise=noise), grads, latent)))


def test_no_rows(emulate: Callable[..., CudaScan]) -> None:
    case = problem((0, 2, 8, 9, 2, 3))
    got, expected = results(emulate(), case), results(PlainScan(), case)
    assert all(torch.equal(got[name], want) for name, want in expected.items())
    assert emulate().sample(torch.empty(0, 2, 6), None, case[-1]).shape == (0, 2, 6)


@pytest.mark.parametrize("shared", [0, 1, 2, 4], ids=lambda kibibytes: f"{kibibytes} KiB")
def test_weights_that_do_not_fit(emulate: Callable[..., CudaScan], shared: int) -> None:
    """With so much shared memory besides the state, some or all tiles are read from the workspace; nothing changes."""
    for sizes in ((2, 2, 24, 40, 3, 9), (2, 2, 24, 40, 9, 0)):
        case = problem(sizes)
        expected = results(emulate(), case)
        core, free = emulate(), {}
        for direction in ("forward", "backward"):
            free[direction] = next(s for s in range(0, AMPLE, 16) if _fits(core, emulate, direction, s, sizes))
        got = results(emulate(shared=max(free.values()) + 1024 * shared), case)
        for name, want in expected.items():
            assert torch.equal(got[name], want), name


def _fits(
    core: CudaScan, emulate: Callable[..., CudaScan], direction: str, shared: int, sizes: tuple[int, ...]
) -> bool:
    emulate(shared=shared)
    try:
        core._planned(direction, torch.device("cpu"), sizes[0], *sizes[2:])
    except BackendError:
        return False
    return True


@pytest.mark.parametrize(("gap", "narrow"), [(8, 0), (0, 0), (2, 4), (6, 4), (3, 2), (1, 2)])
@pytest.mark.parametrize("sizes", [(3, 2, 16, 40, 3, 16), (3, 2, 40, 24, 16, 0)], ids=["categorical", "gaussian"])
def test_weights_are_read_in_words(
    emulate: Callable[..., CudaScan], library: Library, sizes: tuple[int, ...], gap: int, narrow: int
) -> None:
    """As wide as a row's alignment allows, 16, 4 or 2 bytes, each weight once; the results are the same bits."""
    weights, inputs, start, grads, latent = problem(sizes, gap=gap)
    core = emulate()
    got = results(core, (weights, inputs, start, grads, latent))
    read = {width: library.c.apv_emulator_loads(ctypes.c_int64(width)) for width in (2, 4, 16)}  # on the way back
    numbers = sum(x.numel() for x in (weights.stoch, weights.gru, weights.obs, weights.dist))
    width = narrow or 16
    assert read == {2: 0, 4: 0, 16: 0} | {width: 2 * numbers // width}
    expected = results(core, problem(sizes, gap=3))
    assert all(torch.equal(got[name], want) for name, want in expected.items())


def test_each_matrix_is_read_as_wide_as_it_can_be(emulate: Callable[..., CudaScan], library: Library) -> None:
    """As in production, where only img_in's rows, which end with the action, are no multiple of 16 bytes."""
    sizes = (3, 2, 16, 24, 3, 8)
    weights, inputs, start, grads, latent = problem(sizes, gap=8)
    stoch = problem(sizes, gap=2)[0].stoch
    expected = results(emulate(), (weights, inputs, start, grads, latent))
    got = results(emulate(), (weights._replace(stoch=stoch), inputs, start, grads, latent))
    read = {width: library.c.apv_emulator_loads(ctypes.c_int64(width)) for width in (2, 4, 16)}
    others = sum(x.numel() for x in (weights.gru, weights.obs, weights.dist))
    assert read == {2: 0, 4: 2 * stoch.numel() // 4, 16: 2 * others // 16}
    assert all(torch.equal(got[name], want) for name, want in expected.items())


def test_some_gradients_are_absent(emulate: Callable[..., CudaScan]) -> None:
    for noise in ("given", "mode"):
        weights, inputs, start, grads, latent = problem((3, 3, 10, 12, 3, 5), noise=noise)
        for kept in TraceGrads._fields:
            if noise == "mode" and kept == "stoch":
                continue
            some = TraceGrads(**{name: x if name == kept else None for name, x in grads._asdict().items()})
            trace = PlainScan().forward(weights, inputs, start, latent)
            got, expected = (
                core.backward(weights, start, trace, some, latent)._asdict() for core in (emulate(), PlainScan())
            )
            assert_close(got, expected)


@pytest.mark.parametrize("shuffle", [False, True], ids=["one ahead", "shuffled"])
def test_any_order_of_threads(emulate: Callable[..., CudaScan], shuffle: bool) -> None:
    """Blocks that run ahead, blocks that lag, and more blocks than tiles: the same bits."""
    case = problem((3, 3, 20, 24, 3, 9))
    expected = results(emulate(), case)
    for seed in range(4):
        got = results(emulate(blocks=3, seed=seed, shuffle=shuffle), case)
        assert all(torch.equal(got[name], want) for name, want in expected.items())
    got = results(emulate(blocks=50), case)
    assert all(torch.equal(got[name], want) for name, want in expected.items())


# The waits after phases 1 to 5, the one before the first step, and a product's two block barriers (csrc/cuda/layout.h).
FAULTS = {"forward": (1, 2, 3, 4, 5, 6, 10, 11), "backward": (1, 2, 3, 4, 5, 10, 11)}


@pytest.mark.parametrize(("direction", "fault"), [(d, f) for d, faults in FAULTS.items() for f in faults])
def test_a_missing_barrier_is_caught(emulate: Callable[..., CudaScan], direction: str, fault: int) -> None:
    weights, inputs, start, grads, latent = problem((3, 3, 40, 40, 3, 9))
    blocks = 2 if fault == 10 else 5  # 10 parts a block's tile from its next one
    trace = emulate().forward(weights, inputs, start, latent)

    def run(core: CudaScan) -> tuple[Tensor, ...]:
        if direction == "forward":
            return core.forward(weights, inputs, start, latent)
        return core.backward(weights, start, trace, grads, latent)

    expected = run(emulate(blocks=blocks))
    caught = 0
    for seed in range(4):
        for shuffle in (False, True):
            got = run(emulate(blocks, seed=seed, shuffle=shuffle, fault=fault))
            caught += not all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    assert caught > 0


def test_noise_has_the_twins_bits(library: Library) -> None:
    count = 500
    for seed in (0, 7, -(2**62) + 12345, 2**63 - 1):
        word, floats = ctypes.c_uint32(), (ctypes.c_float * 2)()
        words, gumbels, normals = [], [], []
        for index in range(count):
            library.c.apv_noise(ctypes.c_uint64(seed), index, ctypes.byref(word), floats)
            words.append(word.value)
            gumbels.append(floats[0])
            normals.append(floats[1])
        key = torch.tensor(seed)
        assert torch.equal(torch.tensor(words), philox(key, torch.arange(count))[0])
        torch.testing.assert_close(torch.tensor(gumbels), gumbel_noise(key, count), rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(torch.tensor(normals), normal_noise(key, count), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("noise", ["seed", "given", "mode"])
@pytest.mark.parametrize("latent", [Latent(3, 5), Latent(2, 41), Latent(1, 1), Latent(7, 0)], ids=str)
def test_prior_samples(emulate: Callable[..., CudaScan], latent: Latent, noise: str) -> None:
    core, generator = emulate(), torch.Generator().manual_seed(1)
    sample, stats = latent.stoch * (latent.discrete or 1), latent.stoch * (latent.discrete or 2)
    x = torch.randn(3, 5, stats, generator=generator)
    shape = (3, 5, latent.stoch, latent.discrete) if latent.discrete else (3, 5, latent.stoch)
    some = {"seed": torch.tensor(99), "given": torch.randn(shape, generator=generator), "mode": None}[noise]
    torch.testing.assert_close(core.sample(x, some, latent), sample_latent(x, some, latent))
    grad = torch.randn(3, 5, sample, generator=generator)
    arguments = grad, x, some, latent, noise != "mode"
    got, expected = core.sample_backward(*arguments), sample_latent_backward(*arguments)
    assert (got is None) == (expected is None)
    if got is not None and expected is not None:
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)

"""Latents, KL loss, images and λ-returns in C++: every instruction set, any number of threads, latents' samples.

What the ops compute is tested with the other backends in ``tests/ops``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from apv_fast.backend import probe

if not probe("cpu").available:
    pytest.skip(f"cpu: {probe('cpu').reason}", allow_module_level=True)

from apv_fast import _C
from apv_fast.cpu.parts.latent import sample, sample_backward
from apv_fast.ops import normalize_image
from apv_fast.optim import KerasAdam
from apv_fast.recurrence.phases import sample_latent, sample_latent_backward
from apv_fast.types import Latent
from tests.ops import image_loss_problems, kl_balance_problems, lambda_return_problems
from tests.support.yardstick import another, judge, seed_of

every_isa = pytest.mark.parametrize("isa", _C.supported_isas())
LATENTS = [Latent(1, 2), Latent(6, 5), Latent(32, 32), Latent(2, 600), Latent(7, 0, 0.1), Latent(33, 0, 0.0)]
BOTH = [torch.float32, torch.float64]


@pytest.fixture
def forced(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APV_FAST_CPU_ISA", isa)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def latents(latent: Latent, dtype: torch.dtype, rows: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics, noise and a gradient of samples."""
    generator = torch.Generator().manual_seed(seed_of(0))
    width, kinds = latent.stoch * (latent.discrete or 1), 1 if latent.discrete else 2
    stats = 2 * torch.randn(rows, kinds * width, generator=generator, dtype=torch.float64)
    noise, grad = (torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(2))
    shape = (rows, latent.stoch, latent.discrete) if latent.discrete else (rows, latent.stoch)
    return stats.to(dtype), noise.to(dtype).view(shape), grad.to(dtype)


@pytest.mark.statistical
@every_isa
@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("latent", LATENTS, ids=str)
@pytest.mark.parametrize("of", ["tensor", "seed", "modes"])
def test_samples(latent: Latent, dtype: torch.dtype, of: str) -> None:
    """The reference's classes exactly, its Gaussian samples to rounding; gradients within twice its own error."""

    def measure(seed: int) -> dict[str, tuple[float, float]]:
        with another(seed):
            stats, noise, grad = latents(latent, dtype)
        choice = {"tensor": noise, "seed": torch.tensor(-1234567890123), "modes": None}[of]
        got, wanted = sample(stats, choice, latent), sample_latent(stats, choice, latent)
        if latent.discrete:
            assert torch.equal(got, wanted)
        else:  # to the rounding of the two terms, which may cancel
            mean = stats[:, : latent.stoch]
            assert ((got - wanted).abs() <= 2e-6 * (mean.abs() + (wanted - mean).abs())).all()
        return _gradient_errors(stats, choice, grad, latent)

    # float64's truth is no better itself, and noise of a seed is made in float32.
    eps = torch.finfo(torch.float32 if of == "seed" and not latent.discrete else dtype).eps
    judge(measure, dtype, exact=False, floors={"grad": eps * (2 if dtype == torch.float64 else 0.5)})


def _gradient_errors(
    stats: Tensor, choice: Tensor | None, grad: Tensor, latent: Latent
) -> dict[str, tuple[float, float]]:
    """Ours and the reference's, relative; in float64 to the terms of the softmax's gradient, which may cancel."""
    sampled = choice is not None
    exact_noise = choice.double() if choice is not None and choice.is_floating_point() else choice
    exact = sample_latent_backward(grad.double(), stats.double(), exact_noise, latent, sampled)
    got, own = (f(grad, stats, choice, latent, sampled) for f in (sample_backward, sample_latent_backward))
    if exact is None or got is None or own is None:
        assert exact is None and got is None and own is None
        return {"grad": (0.0, 0.0)}
    size = exact.norm().item()
    if latent.discrete and stats.dtype == torch.float64:
        probs = stats.unflatten(-1, (latent.stoch, latent.discrete)).softmax(-1).flatten(-2)
        size = max(size, (probs * grad).norm().item())
    return {"grad": (torch.dist(got.double(), exact).item() / size, torch.dist(own.double(), exact).item() / size)}


@every_isa
@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("dtype", BOTH, ids=str)
def test_ties_infinities_and_nan(dtype: torch.dtype) -> None:
    """The first of equals and the first NaN, as PyTorch has it; two vectors and a part of one."""
    inf, nan, latent = float("inf"), float("nan"), Latent(1, 37)
    for numbers in ({}, {36: 1.0}, {3: inf, 35: inf}, {20: nan}, {36: nan, 4: nan, 1: inf}, {17: inf, 30: nan}):
        for rest in (0.0, -inf):
            stats = torch.full((1, 37), rest, dtype=dtype)
            for place, number in numbers.items():
                stats[0, place] = number
            assert torch.equal(sample(stats, None, latent), sample_latent(stats, None, latent)), (numbers, rest)


@every_isa
@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("kind", kl_balance_problems.KINDS)
@pytest.mark.parametrize("forward", [False, True])
def test_kl(kind: str, forward: bool) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for shape, free in (((2, 3, 5, 13), 0.0), ((1, 2, 33, 64), 5.0)):
            options = kl_balance_problems.SETTINGS | {"forward": forward, "free": free, "free_avg": forward}
            kl_balance_problems.check(kind, "cpu", shape, dtype, 3, options)


@every_isa
@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("dtype", image_loss_problems.DTYPES, ids=str)
def test_images(dtype: torch.dtype) -> None:
    for shape in ((2, 3, 5, 7, 3), (3, 41, 43, 5)):
        for factor in (1.0, -2.5):
            image_loss_problems.assert_exact("cpu", dtype, shape, factor)
    for layout in ("spaced", "contiguous"):
        image_loss_problems.assert_normalized("cpu", dtype, layout)
    image = torch.arange(41 * 43 * 5).to(torch.uint8).view(41, 43, 5)  # no whole number of vectors, more than one block
    wanted = normalize_image(image, dtype, backend="reference")
    assert torch.equal(normalize_image(image, dtype, backend="cpu"), wanted)


@every_isa
@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("dtype", lambda_return_problems.DTYPES, ids=str)
def test_returns(dtype: torch.dtype) -> None:
    for shape in ((1, 1), (3, 7), (15, 65)):
        inputs = lambda_return_problems.inputs(shape, dtype, "cpu", positive=True)
        lambda_return_problems.assert_as_exact_as_reference(inputs, "cpu")


def _samples(dtype: torch.dtype) -> list[Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    stats, noise, grad = latents(Latent(32, 32), wide, 67)
    samples = [sample(stats, torch.tensor(5), Latent(32, 32)), sample(stats, noise, Latent(32, 32))]
    back = sample_backward(grad, stats, noise, Latent(32, 32), True)
    return samples if back is None else [*samples, back]


def _kl(dtype: torch.dtype) -> list[Tensor]:
    leaves = kl_balance_problems.inputs("categorical", (7, 9, 32, 31), dtype)
    loss, value = kl_balance_problems.call("categorical", leaves, "cpu", free=0.5, free_avg=False)
    return [loss, value, *torch.autograd.grad(loss, leaves)]


def _images(dtype: torch.dtype) -> list[Tensor]:
    mean, image = image_loss_problems.inputs((11, 64, 61, 3), dtype, "cpu")
    return [*image_loss_problems.run(mean, image, "cpu"), normalize_image(image, dtype, backend="cpu")]


def _returns(dtype: torch.dtype) -> list[Tensor]:
    return list(lambda_return_problems.run(lambda_return_problems.inputs((33, 2501), dtype, "cpu"), "cpu").values())


def _adam(dtype: torch.dtype) -> list[Tensor]:
    """Three steps of weights of 100 001 and 7 numbers; what is not float32 or float64 is the reference's."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(n, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for n in (100_001, 7)]
    adam = KerasAdam(leaves, clip=20.0, backend="cpu")
    for _ in range(3):
        for leaf in leaves:
            leaf.grad = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(dtype)
        norm = adam.step()
    return [norm, *leaves]


@every_isa
@pytest.mark.usefixtures("forced")
def test_adam() -> None:
    """Whole blocks and parts of one, by other sums than the reference's: float64, and float32 to its rounding."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        got = _adam(dtype)
        with mock.patch("apv_fast.cpu.keras_adam.Step._ours", return_value=False):
            wanted = _adam(torch.float64)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@every_isa
@pytest.mark.usefixtures("forced", "threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("op", [_samples, _kl, _images, _returns, _adam])
def test_the_same_bits_on_any_number_of_threads(op: Callable[[torch.dtype], list[Tensor]], dtype: torch.dtype) -> None:
    """Sizes that are worth several threads, and are not theirs to share evenly."""
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append([x.detach() for x in op(dtype)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_unsupported_dtypes_and_sizes() -> None:
    arguments = {"name": "exp", "count": 1, "from_": 0, "out": 0}
    with pytest.raises(ValueError, match="dtype 'bfloat16' is not supported here"):
        _C.apply_function(**arguments, dtype="bfloat16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="count must not be negative"):
        _C.apply_function(**(arguments | {"count": -1}), dtype="float32")  # type: ignore[arg-type]

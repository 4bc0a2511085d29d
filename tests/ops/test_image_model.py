"""The image encoder and decoder on every backend and instruction set, against float64 runs of their definitions."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from apv_fast.backend import IMPLEMENTATIONS, BackendError, choose, probe
from apv_fast.nn import Encoder
from apv_fast.ops import image_decoder, image_encoder
from tests.ops.image_model_problems import Case, case, pairs, run
from tests.support.yardstick import PROBLEMS, yardsticks

CPU = "cpu" in IMPLEMENTATIONS["image_encoder"] and probe("cpu").available
ISAS: list[str] = []
if CPU:
    from apv_fast import _C

    ISAS = _C.supported_isas()
GPUS = ["triton"] if probe("triton").available else []  # PyTorch's operations in another order, so on a CPU too
BACKENDS_BY_ISA = ["reference", *(f"cpu/{isa}" for isa in ISAS), *GPUS]
BACKENDS = ["reference", *(["cpu"] if CPU else []), *GPUS]
every = pytest.mark.parametrize("backend", BACKENDS)
kinds = pytest.mark.parametrize("kind", ["bytes", "images", "decoder"])
needs_cpu = pytest.mark.skipif(not CPU, reason="the C++ extension is not built")
# images, depth, channels, features: one of each; sizes that no vector divides; more images than a block; full depth.
SIZES = [(1, 1, 1, 1), (7, 3, 3, 9), (67, 8, 3, 40), (1, 48, 3, 33)]


@functools.cache
def expected(
    kind: str, size: tuple[int, int, int, int], dtype: torch.dtype, seed: int, backend: str
) -> tuple[Case, list[Tensor], list[list[Tensor]]]:
    """A case, its results in float64, and PyTorch's in ``dtype``, see :func:`tests.support.yardstick.yardsticks`."""
    x, layers, cotangent = case(kind, size, dtype, seed)
    measured = backend if backend == "cpu" else "reference"  # the convolutions of others are PyTorch's
    plain = yardsticks(lambda: run(kind, x, layers, cotangent, dtype, "reference"), measured)
    return (x, layers, cotangent), exactly(kind, x, layers, cotangent), plain


def exactly(kind: str, x: Tensor, layers: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    """The same in float64."""
    exact = x if kind == "bytes" else x.detach().double().requires_grad_()
    of = [layer.detach().double().requires_grad_() for layer in layers]
    return run(kind, exact, of, cotangent.double(), torch.float64, "reference")


def squares(tensors: list[Tensor]) -> Tensor:
    """Of each tensor's norm; those of fewer than 64 numbers, of which a single one decides, together."""
    of = [x.double().square().sum().item() for x in tensors]
    large = [square if x.numel() >= 64 else 0.0 for square, x in zip(of, tensors, strict=True)]
    return torch.tensor([*large, sum(of) - sum(large)], dtype=torch.float64)


@pytest.mark.statistical
@pytest.mark.parametrize("name", BACKENDS_BY_ISA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@kinds
def test_values_and_gradients(
    name: str, kind: str, size: tuple[int, int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors are at most twice PyTorch's own in that dtype.

    Where that is the dtype of the truth, its own error is float32's by the ratio of their roundings, and so is the
    truth's: twice and once. Where the first problems are outside, the mean square of 4 decides, and then that of 16.
    """
    backend, _, isa = name.partition("/")
    monkeypatch.setenv("APV_FAST_CPU_ISA", isa)
    eps, exact = torch.finfo(dtype).eps, dtype == torch.float64
    error = own = size_of = torch.zeros((), dtype=torch.float64)
    for seed in range(PROBLEMS[-1]):
        (x, layers, cotangent), wanted, plain = expected(kind, size, dtype, seed, backend)
        got = run(kind, x, layers, cotangent, dtype, backend)
        assert [a.dtype for a in got] == [a.dtype for a in plain[0]]
        assert [a.shape for a in got] == [a.shape for a in plain[0]]
        error = error + squares([a.double() - right for a, right in zip(got, wanted, strict=True)])
        if exact:
            _, judged, plain = expected(kind, size, torch.float32, seed, "reference")
        else:
            judged = wanted
        errors = [squares([a.double() - right for a, right in zip(each, judged, strict=True)]) for each in plain]
        own = own + torch.stack(errors).amin(0)
        size_of = size_of + squares(wanted)
        if seed + 1 not in ((2 if size[1] < 8 else 1), *PROBLEMS[1:]):
            continue
        bound = 3 * own.sqrt() * eps / torch.finfo(torch.float32).eps if exact else 2 * own.sqrt()
        if (error.sqrt() <= torch.maximum(bound, eps * size_of.sqrt())).all():
            return
    raise AssertionError(error.sqrt() / own.sqrt())


@needs_cpu
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_the_same_bits_on_any_number_of_threads(
    kind: str, dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of more images than a block has, so that sums are continued."""
    monkeypatch.setenv("APV_FAST_CPU_ISA", isa)
    x, layers, cotangent = case(kind, (67, 2, 3, 5), dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(kind, x, layers, cotangent, dtype, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@every
@kinds
def test_images_do_not_mix(backend: str, kind: str) -> None:
    """Each has the result that it has alone, and a NaN stays where it is."""
    x, layers, _ = case(kind, (5, 3, 3, 7), torch.float32)
    op: Callable[..., Tensor] = image_decoder if kind == "decoder" else image_encoder
    with torch.no_grad():
        together = op(x, pairs(layers), backend=backend)
        alone = torch.stack([op(one, pairs(layers), backend=backend) for one in x])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
        if kind != "bytes":
            x[2].view(-1)[0] = torch.nan
            spoilt = op(x, pairs(layers), backend=backend)
            assert spoilt[2].isnan().any() and spoilt[[0, 1, 3, 4]].isfinite().all()


@every
@kinds
def test_strides_and_leading_dimensions(backend: str, kind: str) -> None:
    x, layers, cotangent = case(kind, (6, 3, 3, 7), torch.float32)
    wanted = run(kind, x, layers, cotangent, torch.float32, backend)
    turned = [w.detach().transpose(0, 1).contiguous().transpose(0, 1) if w.dim() > 1 else w.detach() for w in layers]
    turned = [w.requires_grad_() for w in turned]
    other = x.detach().transpose(0, 1).contiguous().transpose(0, 1).unflatten(0, (3, 2))
    other = other if kind == "bytes" else other.requires_grad_()
    spread = torch.stack([cotangent, cotangent + 1], -1)[..., 0].unflatten(0, (3, 2))
    assert not spread.is_contiguous()
    got = run(kind, other, turned, spread, torch.float32, backend)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.reshape(b.shape), b, rtol=1e-5, atol=1e-5)


@every
@kinds
def test_only_what_is_wanted(backend: str, kind: str) -> None:
    x, layers, cotangent = case(kind, (2, 2, 1, 3), torch.float32)
    wanted = run(kind, x, layers, cotangent, torch.float32, backend)
    frozen = [w.detach() for w in layers]
    result = run(kind, x, frozen, cotangent, torch.float32, backend)
    assert all(torch.equal(a, b) for a, b in zip(result, wanted, strict=False))
    result = run(kind, x.detach(), [*frozen[:-1], layers[-1]], cotangent, torch.float32, backend)
    assert len(result) == 2 and torch.equal(result[1], wanted[-1])
    with torch.no_grad():
        assert torch.equal(run(kind, x.detach(), frozen, cotangent, torch.float32, backend)[0], wanted[0])


@every
@kinds
def test_no_images(backend: str, kind: str) -> None:
    x, layers, cotangent = case(kind, (1, 2, 3, 5), torch.float32)
    empty = x.detach()[:0] if kind == "bytes" else x.detach()[:0].requires_grad_()
    result, *grads = run(kind, empty, layers, cotangent[:0], torch.float32, backend)
    assert result.shape == cotangent[:0].shape
    assert not any(bool(grad.any()) for grad in grads)


@needs_cpu
def test_opcheck() -> None:
    importlib.import_module("apv_fast.cpu.image_model")  # registers them
    for kind in ("bytes", "images", "decoder"):
        x, layers, _ = case(kind, (2, 1, 3, 3), torch.float32)
        name = "image_decoder_cpu" if kind == "decoder" else "image_encoder_cpu"
        torch.library.opcheck(getattr(torch.ops.apv_fast, name).default, (x, layers, torch.float32, True))
        op = torch.ops.apv_fast.image_decoder if kind == "decoder" else torch.ops.apv_fast.image_encoder
        torch.library.opcheck(op.default, (x, layers, torch.float32, "cpu"))


@every
def test_compilation(backend: str) -> None:
    x, layers, _ = case("bytes", (2, 4, 3, 3), torch.float32)
    feat, rest, _ = case("decoder", (2, 4, 3, 3), torch.float32)

    def both() -> Tensor:
        return image_encoder(x, pairs(layers), backend=backend).sum() + image_decoder(feat, pairs(rest)).sum()

    torch.testing.assert_close(torch.compile(both, fullgraph=True, backend="aot_eager")(), both())
    torch.compiler.reset()


@needs_cpu
def test_float16_is_left_to_pytorch() -> None:
    like = torch.zeros(1, dtype=torch.float16)
    assert choose("image_encoder", like, channels=3) == "reference"
    with pytest.raises(BackendError, match=r"its convolutions do not take torch\.float16"):
        choose("image_decoder", like, "cpu", channels=3)


def test_modules_take_backends_without_convolutions() -> None:
    image = torch.randint(256, (1, 64, 64, 3), dtype=torch.uint8)
    for backend in ("triton", "reference"):
        encoder = Encoder(1, backend=backend)
        wanted = image_encoder(image, pairs(list(encoder.parameters())), backend="reference")
        assert torch.equal(encoder(image), wanted)


X, E = case("bytes", (2, 2, 3, 5), torch.float32)[:2]
F, D = case("decoder", (2, 2, 3, 5), torch.float32)[:2]
ENCODER_ERRORS: list[tuple[Any, Any, type[Exception], str]] = [
    (None, pairs(E), TypeError, "image_encoder: image is a NoneType; it must be a torch.Tensor"),
    (X.int(), pairs(E), TypeError, "image_encoder: image has dtype torch.int32; it must be torch.uint8"),
    (
        X[:, 1:],
        pairs(E),
        ValueError,
        "image_encoder: image has shape (2, 63, 64, 3); it must be [N0, H, W, C]",
    ),
    (X, pairs(E)[1:], ValueError, "image_encoder: layers has 3 entries; there must be 4"),
    (
        X[..., 1:],
        pairs(E),
        ValueError,
        "image_encoder: layers[0] weight has shape (2, 3, 4, 4); it must be [D0",
    ),
    (X, [*pairs(E)[:3], (E[6][:8], E[7])], ValueError, "image_encoder: layers[3] weight has shape (8, 8, 4, 4)"),
    (X, [(E[0], E[1][1:]), *pairs(E)[1:]], ValueError, "image_encoder: layers[0] bias has shape (1,); it must be [D0]"),
]
DECODER_ERRORS: list[tuple[Any, Any, type[Exception], str]] = [
    (X, pairs(D), TypeError, "image_decoder: feat has dtype torch.uint8; it must be a floating-point tensor"),
    (F[:, :0], pairs(D), ValueError, "image_decoder: feat has no features; F must be at least 1"),
    (F[:, 1:], pairs(D), ValueError, "image_decoder: layers[0] weight has shape (64, 5); it must be [E, F] with F=4"),
    (F, pairs(D)[1:], ValueError, "image_decoder: layers has 4 entries; there must be 5"),
    (
        F,
        [(D[0][1:], D[1][1:]), *pairs(D)[1:]],
        ValueError,
        "image_decoder: layers[0] has 63 outputs; it must be",
    ),
    (F, [*pairs(D)[:4], (D[8][:, :, 1:], D[9])], ValueError, "image_decoder: layers[4] weight has shape (2, 3, 5, 6)"),
]


@pytest.mark.parametrize(("image", "layers", "error", "message"), ENCODER_ERRORS)
def test_bad_input_of_the_encoder(image: Any, layers: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        image_encoder(image, layers)


@pytest.mark.parametrize(("feat", "layers", "error", "message"), DECODER_ERRORS)
def test_bad_input_of_the_decoder(feat: Any, layers: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        image_decoder(feat, layers)


def test_dtypes_must_be_floating() -> None:
    with pytest.raises(TypeError, match=r"image_encoder: dtype is torch\.uint8; it must be a floating-point dtype"):
        image_encoder(X, pairs(E), dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"image_decoder: dtype is torch\.int32; it must be a floating-point dtype"):
        image_decoder(F, pairs(D), dtype=torch.int32)

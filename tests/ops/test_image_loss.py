"""The image loss and the normalisation of bytes on every backend, against float64 runs of their definitions."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from apv_fast.backend import IMPLEMENTATIONS, probe
from apv_fast.nn import Decoder, Encoder
from apv_fast.ops import image_loss, normalize_image
from tests.ops.image_loss_problems import (
    DTYPES,
    LAYOUTS,
    assert_exact,
    assert_normalized,
    device_of,
    inputs,
    run,
    truth,
)

BACKENDS = [name for name in IMPLEMENTATIONS["image_loss"] if probe(name).available]
every = pytest.mark.parametrize("backend", BACKENDS)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
# One number; odd sizes; no leading dimension; more than one block and program; images as they are.
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7, 3), (4, 6, 1), (3, 41, 43, 5), (2, 1, 64, 64, 3)]


@pytest.mark.statistical
@every
@all_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("factor", [1.0, -2.5])
def test_value_and_gradient(backend: str, dtype: torch.dtype, shape: tuple[int, ...], factor: float) -> None:
    assert_exact(backend, dtype, shape, factor)


@every
@pytest.mark.parametrize("of_mean", [*LAYOUTS, "contiguous"])
@pytest.mark.parametrize("of_image", [*LAYOUTS, "contiguous"])
def test_any_strides(backend: str, of_mean: str, of_image: str) -> None:
    """What contiguous copies give: the gradient bit for bit, the loss but for the order of its sum."""
    mean, image = inputs((2, 3, 5, 4, 3), torch.float32, device_of(backend))
    layouts = LAYOUTS | {"contiguous": lambda x: x}
    mean, image = layouts[of_mean](mean.detach()).requires_grad_(), layouts[of_image](image)
    expected = run(mean.detach().contiguous().requires_grad_(), image.contiguous(), backend)
    got = run(mean, image, backend)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=0)
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_gradient_of_channels_first_memory_is_channels_first(backend: str) -> None:
    mean, image = inputs((2, 5, 4, 3), torch.float32, device_of(backend))
    strided = LAYOUTS["channels first"](mean.detach()).requires_grad_()
    _, gradient = run(strided, image, backend)
    assert gradient.stride() == strided.stride() != mean.stride()


@every
def test_cotangent_from_an_expanded_sum(backend: str) -> None:
    mean, image = inputs((2, 3, 4, 3), torch.float64, device_of(backend))
    (gradient,) = torch.autograd.grad(image_loss(mean, image, backend=backend).expand(3).sum(), mean)
    torch.testing.assert_close(gradient.cpu(), truth(mean, image, 3.0)[1])


@every
def test_a_perfect_mean_costs_the_constant(backend: str) -> None:
    _, image = inputs((2, 3, 4, 3), torch.float64, device_of(backend))
    mean = normalize_image(image, torch.float64, backend=backend).requires_grad_()
    loss, gradient = run(mean, image, backend)
    assert loss.item() == pytest.approx(0.5 * math.log(2 * math.pi) * 36, rel=1e-14)
    assert not gradient.any()


@every
def test_many_partial_sums(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than the last kernel adds at a time."""
    if backend == "triton":
        for name, value in (("BLOCK", 16), ("STEPS", 2), ("FINISH", 4)):
            monkeypatch.setattr(f"apv_fast.kernels.image_loss.{name}", value)
    mean, image = inputs((5, 7, 9, 3), torch.float32, device_of(backend))
    for a, b in zip(run(mean, image, backend), truth(mean, image), strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=1e-5, atol=1e-7)


@every
def test_the_same_bits_every_time(backend: str) -> None:
    mean, image = inputs((2, 33, 31, 3), torch.float32, device_of(backend))
    first = run(mean, image, backend)
    assert all(torch.equal(a, b) for _ in range(19) for a, b in zip(run(mean, image, backend), first, strict=True))


@every
def test_no_images(backend: str) -> None:
    """The mean of nothing, as PyTorch has it."""
    mean, image = inputs((0, 3, 4, 4, 3), torch.float32, device_of(backend))
    loss, gradient = run(mean, image, backend)
    assert loss.isnan() and gradient.shape == mean.shape
    assert normalize_image(image, backend=backend).shape == mean.shape


@every
@all_dtypes
@pytest.mark.parametrize("layout", [*LAYOUTS, "contiguous"])
def test_normalize_image(backend: str, dtype: torch.dtype, layout: str) -> None:
    assert_normalized(backend, dtype, layout)


@every
def test_opcheck_and_compilation(backend: str) -> None:
    mean, image = inputs((2, 5, 4, 3), torch.float32, device_of(backend))
    torch.library.opcheck(torch.ops.apv_fast.image_loss.default, (mean, image, backend))
    torch.library.opcheck(torch.ops.apv_fast.normalize_image.default, (image, torch.bfloat16, backend))
    if backend == "triton":
        torch.library.opcheck(torch.ops.apv_fast.image_loss_triton.default, (mean, image, True))
        strided = LAYOUTS["channels first"](mean.detach()).requires_grad_()
        torch.library.opcheck(torch.ops.apv_fast.image_loss_triton.default, (strided, image, True))
        torch.library.opcheck(torch.ops.apv_fast.normalize_image_triton.default, (image, torch.bfloat16, False))
    if backend == "cpu":
        strided = LAYOUTS["channels first"](mean.detach()).requires_grad_()
        for leaf in (mean, strided):
            torch.library.opcheck(torch.ops.apv_fast.image_loss_cpu.default, (leaf, image, True))
        torch.library.opcheck(torch.ops.apv_fast.normalize_image_cpu.default, (image, torch.bfloat16, False))
    compiled = torch.compile(image_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(mean, image, backend=backend), image_loss(mean, image, backend=backend))
    torch.compiler.reset()


X, U = torch.zeros(2, 3, 4, 1), torch.zeros(2, 3, 4, 1, dtype=torch.uint8)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"mean": U}, TypeError, "image_loss: mean has dtype torch.uint8; it must be a floating-point tensor"),
    ({"mean": None}, TypeError, "image_loss: mean is a NoneType; it must be a torch.Tensor"),
    ({"mean": X[0, 0]}, ValueError, "image_loss: mean has shape (4, 1); it must be [H, W, C]"),
    ({"image": X}, TypeError, "image_loss: image has dtype torch.float32; it must be torch.uint8"),
    ({"image": U[:1]}, ValueError, "image_loss: image has shape (1, 3, 4, 1); it must be [N0, H, W, C] with N0=2"),
    ({"image": U[0]}, ValueError, "image_loss: image has shape (3, 4, 1); it must be"),
    ({"image": U.to("meta")}, ValueError, "image_loss: image is on meta; it must be on cpu"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD)
def test_bad_input_names_the_argument(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        image_loss(**({"mean": X, "image": U} | changed))


def test_bad_input_of_normalize_image() -> None:
    with pytest.raises(TypeError, match=r"normalize_image: image has dtype torch\.float32; it must be torch\.uint8"):
        normalize_image(X)
    with pytest.raises(TypeError, match=r"normalize_image: dtype is torch\.int32; it must be a floating-point dtype"):
        normalize_image(U, torch.int32)
    with pytest.raises(ValueError, match=r"normalize_image: image has shape \(4, 1\); it must be \[H, W, C\]"):
        normalize_image(U[0, 0])


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_encoder_sees_the_same_numbers(backend: str, dtype: torch.dtype) -> None:
    """What the op gives and bytes that the encoder normalises itself, on a GPU by the op, elsewhere plainly."""
    torch.manual_seed(0)
    encoder = Encoder(2, dtype=dtype).to(device_of(backend))
    _, image = inputs((2, 64, 64, 3), torch.float32, device_of(backend))
    x = normalize_image(image, dtype, backend=backend)
    assert x.permute(0, 3, 1, 2).is_contiguous(memory_format=torch.channels_last)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(encoder(x), encoder(image), rtol=tolerance, atol=tolerance)


def test_the_decoder_hands_its_mean_over_in_the_dtype_of_its_products() -> None:
    """So no float32 copy of all images is made for the loss; the numbers and the gradients are those of the copy."""
    torch.manual_seed(0)
    decoder, feat = Decoder(7, 2, dtype=torch.bfloat16), torch.randn(2, 3, 7)
    _, image = inputs((2, 3, 64, 64, 3), torch.float32, "cpu")
    mean = decoder.mean(feat)
    assert mean.dtype == torch.bfloat16 and torch.equal(mean.float(), decoder(feat))
    losses = [image_loss(mean, image, backend="reference"), image_loss(decoder(feat), image, backend="reference")]
    gradients = [torch.autograd.grad(loss, list(decoder.parameters())) for loss in losses]
    assert torch.equal(*losses)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))

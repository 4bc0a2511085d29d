"""Problems for ``image_loss`` and ``normalize_image``, and how exact backends are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from apv_fast.backend import probe
from apv_fast.ops import image_loss, normalize_image
from tests.support.yardstick import judge, seed_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A leaf of means and uint8 images."""
    generator = torch.Generator().manual_seed(seed_of(seed))
    image = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    mean = 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return mean.to(device, dtype).requires_grad_(), image.to(device)


def run(mean: Tensor, image: Tensor, backend: str, factor: float = 1.0) -> list[Tensor]:
    """The loss, and the gradient of ``factor`` times it."""
    loss = image_loss(mean, image, backend=backend)
    (gradient,) = torch.autograd.grad(factor * loss, mean)
    return [loss.detach(), gradient]


def truth(mean: Tensor, image: Tensor, factor: float = 1.0) -> list[Tensor]:
    """By torch.distributions in float64."""
    exact = mean.detach().double().cpu().requires_grad_()
    pixels = image.cpu().double() / 255 - 0.5
    normal = torch.distributions.Independent(torch.distributions.Normal(exact, 1.0), 3)
    loss = -normal.log_prob(pixels).mean()
    (gradient,) = torch.autograd.grad(factor * loss, exact)
    return [loss.detach(), gradient]


def _terms(mean: Tensor, image: Tensor, factor: float) -> float:
    """The norm of what the gradient is the difference of, which may cancel where it is one number."""
    terms = torch.cat([mean.detach().double().cpu().flatten(), image.cpu().flatten().double() / 255 - 0.5])
    return abs(factor) * terms.norm().item() / mean.shape[:-3].numel()


def device_of(backend: str) -> str:
    return probe(backend).devices[-1]


def _spaced(x: Tensor) -> Tensor:
    """The same numbers, no dimension contiguous."""
    wide = x.new_full((*(2 * size for size in x.shape),), 77)
    return wide[(slice(None, None, 2),) * x.dim()].copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels first": lambda x: x.movedim(-1, -3).contiguous().movedim(-3, -1),
    "spaced": _spaced,
    "steps first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "part of the steps": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "expanded": lambda x: x[:, :1, :1].expand_as(x),
}


def assert_exact(backend: str, dtype: torch.dtype, shape: tuple[int, ...], factor: float) -> None:
    """Value and gradient, see :func:`tests.support.yardstick.judge`; Triton's interpreter truncates to bfloat16."""

    def measure(seed: int) -> dict[str, tuple[float, float]]:
        mean, image = inputs(shape, dtype, device_of(backend), seed)
        wanted = truth(mean, image, factor)
        got, reference = run(mean, image, backend, factor), run(mean, image, "reference", factor)
        assert got[0].shape == () and got[0].dtype == torch.promote_types(dtype, torch.float32)
        assert got[1].dtype == dtype
        sizes = {"loss": wanted[0].norm().item(), "gradient": _terms(mean, image, factor)}
        return {
            name: (torch.dist(a.double().cpu(), right).item() / size, torch.dist(b.double().cpu(), right).item() / size)
            for (name, size), a, b, right in zip(sizes.items(), got, reference, wanted, strict=True)
        }

    scale = 2.0 if dtype == torch.float64 else 0.5  # the truth is no better itself
    kinds = {"loss": torch.promote_types(dtype, torch.float32), "gradient": dtype}
    judge(measure, dtype, exact=False, floors={name: scale * torch.finfo(of).eps for name, of in kinds.items()})


def assert_normalized(backend: str, dtype: torch.dtype, layout: str) -> None:
    """Every byte as exact as the reference: an error of 2^-25, or 2^-54, and then one rounding to 16 bits."""
    image = torch.arange(256, dtype=torch.uint8).repeat(3)[: 2 * 3 * 6 * 7 * 3].reshape(2, 3, 6, 7, 3)
    image = (LAYOUTS | {"contiguous": lambda x: x})[layout](image).to(device_of(backend))
    got = normalize_image(image, dtype, backend=backend)
    assert got.dtype == dtype and got.shape == image.shape
    bound = 2.0**-54 if dtype == torch.float64 else 2.0**-25
    if dtype.itemsize == 2:  # Triton's interpreter truncates to bfloat16
        bound += torch.finfo(dtype).eps / 4
    assert (got.double().cpu() - (image.cpu().double() / 255 - 0.5)).abs().max().item() <= bound
    if backend == "triton":
        assert got.is_contiguous()

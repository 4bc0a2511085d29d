"""Samples of latents and their gradient in C++, ``csrc/cpu/parts/sample.cpp``: all rows in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from apv_fast import _C
from apv_fast.cpu.parts.call import address, how, name_of
from apv_fast.types import Latent


def _run(stats: Tensor, noise: Tensor | None, latent: Latent, grad: Tensor | None, width: int) -> Tensor:
    stats = stats.contiguous()
    noise = None if noise is None else noise.contiguous()
    grad = None if grad is None else grad.contiguous()
    out = stats.new_empty(*stats.shape[:-1], width)
    seeded = noise is not None and not noise.is_floating_point()
    _C.sample(
        rows=stats.numel() // stats.shape[-1] if stats.shape[-1] else 0,
        stoch=latent.stoch,
        discrete=latent.discrete,
        min_std=latent.min_std,
        stats=address(stats),
        noise=0 if seeded else address(noise),
        seed=address(noise) if seeded else 0,
        grad=address(grad),
        out=address(out),
        **how(stats.dtype),
    )
    return out


def sample(stats: Tensor, noise: Tensor | None, latent: Latent) -> Tensor:
    """See :func:`apv_fast.recurrence.phases.sample_latent`: the samples ``[..., L]`` of ``stats [..., M]``.

    Args:
        stats: logits, or mean and the preactivation of std; float32 or float64.
        noise: in the dtype of ``stats``, or an int64 scalar, its seed; None: modes.
        latent: the kind of latent.
    """
    return _run(stats, noise, latent, None, latent.stoch * (latent.discrete or 1))


def sample_backward(grad: Tensor, stats: Tensor, noise: Tensor | None, latent: Latent, sampled: bool) -> Tensor | None:
    """The gradient of ``stats``: see :func:`apv_fast.recurrence.phases.sample_latent_backward`."""
    if latent.discrete and not sampled:
        return None
    return _run(stats, noise, latent, grad.to(stats.dtype), stats.shape[-1])


def function(name: str, x: Tensor) -> Tensor:
    """A function of ``csrc/cpu/parts/functions.cpp`` of ``x``, element by element; for tests."""
    out = torch.empty_like(x)
    _C.apply_function(name=name, count=x.numel(), from_=address(x), out=address(out), dtype=name_of(x.dtype))
    return out

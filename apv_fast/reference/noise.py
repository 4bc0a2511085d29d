"""Counter-based noise: a function of a seed and an element's index, the same on every backend (Salmon et al. 2011)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from apv_fast.types import Latent

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
ROUNDS = 10


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``constant · x``, in 16-bit pieces since int64 has no room for the product's sign."""
    low = constant * (x & 0xFFFF)  # < 2^48
    high = constant * (x >> 16) + (low >> 16)  # < 2^49
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(seed: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Philox-4x32-10's first two 32-bit words, as int64: key ``seed`` (int64 scalar), counter ``(index, 0, 0, 0)``."""
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1, c2, c3 = index & _MASK, torch.zeros_like(index), torch.zeros_like(index), torch.zeros_like(index)
    for _ in range(ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return c0, c1


def _open_unit(word: Tensor) -> Tensor:
    """Uniforms in (0, 1) with 23 bits, float32: neither end is reached."""
    return ((word >> 9).to(torch.float32) + 0.5) / 8388608.0


def _words(seed: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    index = torch.arange(math.prod(shape), device=seed.device).view(shape)
    return philox(seed, index)


def uniform_noise(seed: Tensor, *shape: int) -> Tensor:
    """Uniforms in (0, 1), float32 ``shape``."""
    return _open_unit(_words(seed, shape)[0])


def gumbel_noise(seed: Tensor, *shape: int) -> Tensor:
    """Gumbel noise ``−log(−log u)``, float32 ``shape``."""
    return -(-uniform_noise(seed, *shape).log()).log()


def normal_noise(seed: Tensor, *shape: int) -> Tensor:
    """Standard normals by Box and Muller, float32 ``shape``."""
    first, second = _words(seed, shape)
    return (-2 * _open_unit(first).log()).sqrt() * (2 * math.pi * _open_unit(second)).cos()


def whole_noise(noise: Tensor | None, leading: tuple[int, ...], latent: Latent, dtype: torch.dtype) -> Tensor | None:
    """Noise of ``leading`` states: as it is, or made of its seed."""
    if noise is None or noise.is_floating_point():
        return noise
    if latent.discrete:
        return gumbel_noise(noise, *leading, latent.stoch, latent.discrete).to(dtype)
    return normal_noise(noise, *leading, latent.stoch).to(dtype)

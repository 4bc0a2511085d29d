"""Noise of latents as a caller gives it, or drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from apv_fast.backend import choose, load, probe
from apv_fast.ops.check import Arguments
from apv_fast.ops.rssm_checks import stoch_dims
from apv_fast.types import Latent, Noise, NoisePair, RSSMParams, state_dtype

GUMBEL = "apv_fast.cpu.parts.noise:gumbel"  # of a seed


def seeded(latent: Latent, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether :func:`sample_noise` takes one number from the generator and makes all of the noise of it, in C++."""
    plain = latent.discrete > 0 and device.type == "cpu" and dtype == torch.float32
    return plain and not torch.compiler.is_compiling() and probe("cpu").available


def sample_seeds(count: int, generator: torch.Generator | None) -> Tensor:
    """``count`` seeds, int64, as many draws of one would give."""
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)


def sample_noise(
    latent: Latent, *leading: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """Noise for ``leading`` states: Gumbel ``[..., S, C]`` or standard normal ``[..., S]``.

    The same for every backend. Gumbel noise on a CPU is made of a seed by the C++ extension, if that is there: PyTorch
    draws it on one thread, number by number. Not while ``torch.compile`` traces: then PyTorch draws all.
    """
    if not latent.discrete:
        return torch.randn(*leading, latent.stoch, dtype=dtype, device=device, generator=generator)
    shape = (*leading, latent.stoch, latent.discrete)
    if seeded(latent, dtype, device):
        gumbel: Tensor = load(GUMBEL)(*sample_seeds(1, generator), shape)  # the extension may be missing
        return gumbel
    return -torch.empty(shape, dtype=dtype, device=device).exponential_(generator=generator).log()


def noise_pair(
    arguments: Arguments,
    params: RSSMParams,
    latent: Latent,
    noise: Noise,
    sample: bool,
    leading: tuple[int, ...],
    generator: torch.Generator | None,
    backend: str | None,
) -> NoisePair:
    """Noise of posterior and prior: as given, else drawn, else (None, None) for modes.

    For a fast backend on a GPU only two seeds are drawn: its kernels make the noise where they use it.
    """
    if not sample:
        return None, None
    if noise is None:
        dtype, device = state_dtype(params.gru_weight.dtype), params.gru_weight.device
        if device.type == "cuda" and choose(arguments.op.partition(":")[0], params.gru_weight, backend) != "reference":
            seeds = torch.randint(-(2**63), 2**63 - 1, (2,), device=device, generator=generator)
            return seeds[0], seeds[1]
        first = sample_noise(latent, *leading, dtype=dtype, device=device, generator=generator)
        return first, sample_noise(latent, *leading, dtype=dtype, device=device, generator=generator)
    pair = (noise, noise) if isinstance(noise, Tensor) else noise
    arguments.require(len(pair) == 2, f"noise has {len(pair)} tensors; it must be one, or a pair (posterior, prior)")
    dims = stoch_dims(latent, "B T"[: 2 * len(leading) - 1])
    dtype = state_dtype(params.gru_weight.dtype)
    for name, x in zip(("noise of the posterior", "noise of the prior"), pair, strict=True):
        seed = isinstance(x, Tensor) and x.dim() == 0 and x.dtype == torch.int64
        arguments.tensor(name, x, "" if seed else dims, torch.int64 if seed else None)
    post, prior = (x if x.dtype == torch.int64 else x.to(dtype) for x in pair)
    return post, prior

r"""Samples of the latents and their gradient, one launch each; what a product's epilogue samples with, too.

Categorical, per variable (a row of C logits ℓ), with Gumbel noise γ or none (the mode)::

    z      = onehot(argmax(ℓ + γ))                 the first of equals
    ∂ℓ     = ∂ℓ' + p·(∂z - Σ p·∂z),  p = softmax(ℓ)   straight through; a mode has no gradient

Gaussian, with standard normal noise ε or none, from the mean and the preactivation ρ of std::

    z      = mean + (2·sigmoid(ρ/2) + min_std)·ε
    ∂mean  = ∂mean' + ∂z,  ∂ρ = ∂ρ' + ∂z·ε·s·(1 - s),  s = sigmoid(ρ/2)

where the primed gradients are those of the statistics themselves. Noise is a tensor, or a seed: then it is made where
it is used (:mod:`apv_fast.kernels.parts.pointwise`), from the flat index in the noise of the whole call. Softmax is
recomputed in the backward pass: storing it would cost what reading the logits costs, and its bytes.

Floor at 2500 x 32 x 32 in float32: 20.5 MB forward without a noise tensor, 6.1 µs of an H100's 3.35 TB/s.
"""
# Kernels are Triton, not Python: arguments are pointers.
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from apv_fast.types import Latent

from .pointwise import exp, gumbel, normal, sigmoid
from .tiles import accumulator, on, store

TILE = 2048  # numbers a program
NONE, TENSOR, SEED = 0, 1, 2  # where noise comes from


class Noise(NamedTuple):
    """Noise of one step: element j of row r is number ``offset + r·row + j`` of the whole call's noise."""

    source: Tensor | None  # the step's part of a contiguous tensor, or an int64 scalar: the seed, or None: modes
    offset: int  # where the step begins in the whole; only a seed needs it
    row: int

    @property
    def kind(self) -> int:
        """NONE, TENSOR or SEED, for kernels to be compiled with."""
        return NONE if self.source is None else TENSOR if self.source.is_floating_point() else SEED


def whole(noise: Tensor | None, width: int) -> Noise:
    """Noise of a call of one step, ``[..., width]``; any strides."""
    return Noise(noise if noise is None else noise.contiguous(), 0, width)


def noise_of_step(noise: Tensor | None, t: int, offset: int, row: int) -> Noise:
    """Noise of step t of a call, whose element j of row r is number ``t·offset + r·row + j``; ``noise`` contiguous."""
    if noise is not None and noise.is_floating_point():
        return Noise(noise.view(-1)[t * offset :], 0, row)
    return Noise(noise, t * offset, row)


@triton.jit
def noise_at(source, offset, index, mask, KIND: tl.constexpr, NORMAL: tl.constexpr, ACC: tl.constexpr):
    """Noise of the elements ``index`` of a step: loaded, or made of the seed that ``source`` points to."""
    if KIND == 1:
        return tl.load(source + index, mask, 0.0).to(ACC)
    else:  # not left out: what follows a return is compiled too
        seed, number = tl.load(source), offset + index
        return (normal(seed, number) if NORMAL else gumbel(seed, number)).to(ACC)


@triton.jit
def one_hot(score, column, C: tl.constexpr):
    """One-hot [R, CP] of the largest score of each row among its first C columns."""
    score = tl.where(column < C, score, -float("inf"))
    best = tl.argmax(score, 1, tie_break_left=True)
    return (column == best[:, None]).to(score.dtype)


@triton.jit
def softmax_gradient(logit, grad, column, C: tl.constexpr):
    """The gradient of logits [R, CP] from that of straight-through samples; ``grad`` is 0 beyond C."""
    logit = tl.where(column < C, logit, -float("inf"))
    e = exp(logit - tl.max(logit, 1)[:, None])
    p = tl.where(column < C, e, 0.0) / tl.sum(tl.where(column < C, e, 0.0), 1)[:, None]
    return p * (grad - tl.sum(p * grad, 1)[:, None])


@triton.jit
def _groups(n, S: tl.constexpr, C: tl.constexpr, BG: tl.constexpr, CP: tl.constexpr):
    """(row [BG, 1], position within the row [BG, CP], class [1, CP], mask) of this program's variables."""
    group = tl.program_id(0).to(tl.int64) * BG + tl.arange(0, BG)[:, None]
    column = tl.arange(0, CP)[None, :]
    row = group // S
    return row, (group % S) * C + column, column, (row < n) & (column < C)


@triton.jit(do_not_specialize=["noise_offset"])
def sample_categorical_kernel(
    stats, noise, stoch, narrow,  # [n, S·C], the noise or its seed, [n, S·C] twice
    n, noise_offset, noise_row, stats_row, stoch_row, narrow_row,
    S: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr, NARROW: tl.constexpr, ACC: tl.constexpr,
    BG: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    """One-hot samples of BG variables; with NARROW also as operands of the next product."""
    row, j, column, mask = _groups(n, S, C, BG, CP)
    score = tl.load(stats + row * stats_row + j, mask, 0.0).to(ACC)
    if KIND > 0:
        score += noise_at(noise, noise_offset, row * noise_row + j, mask, KIND, False, ACC)
    z = one_hot(score, column, C)
    store(stoch + row * stoch_row + j, z, mask)
    if NARROW:
        store(narrow + row * narrow_row + j, z, mask)


@triton.jit
def categorical_backward_kernel(
    grad_stoch, grad_stats, stats, out,  # [n, S·C] each
    n, grad_stoch_row, grad_stats_row, stats_row, out_row,
    S: tl.constexpr, C: tl.constexpr, OWN: tl.constexpr, ACC: tl.constexpr, BG: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    """The logits' gradient from the samples' and, with OWN, their own."""
    row, j, column, mask = _groups(n, S, C, BG, CP)
    grad = tl.load(grad_stoch + row * grad_stoch_row + j, mask, 0.0).to(ACC)
    logit = tl.load(stats + row * stats_row + j, mask, 0.0).to(ACC)
    total = softmax_gradient(logit, grad, column, C)
    if OWN:
        total += tl.load(grad_stats + row * grad_stats_row + j, mask, 0.0).to(ACC)
    store(out + row * out_row + j, total, mask)


@triton.jit
def _elements(n, S: tl.constexpr, BLOCK: tl.constexpr):
    """(row, position within the row, mask) of this program's Gaussian variables."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return i // S, i % S, i // S < n


@triton.jit(do_not_specialize=["noise_offset"])
def sample_gaussian_kernel(
    stats, noise, stoch, narrow,  # [n, 2S], the noise or its seed, [n, S] twice
    n, noise_offset, noise_row, stats_row, stoch_row, narrow_row,
    S: tl.constexpr, MIN_STD: tl.constexpr, KIND: tl.constexpr, NARROW: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Samples of BLOCK variables."""
    row, j, mask = _elements(n, S, BLOCK)
    z = tl.load(stats + row * stats_row + j, mask, 0.0).to(ACC)
    if KIND > 0:
        std = 2.0 * sigmoid(tl.load(stats + row * stats_row + S + j, mask, 0.0).to(ACC) * 0.5) + MIN_STD
        z += std * noise_at(noise, noise_offset, row * noise_row + j, mask, KIND, True, ACC)
    store(stoch + row * stoch_row + j, z, mask)
    if NARROW:
        store(narrow + row * narrow_row + j, z, mask)


@triton.jit(do_not_specialize=["noise_offset"])
def gaussian_backward_kernel(
    grad_stoch, grad_stats, stats, noise, out,  # [n, S], [n, 2S] twice, the noise or its seed, [n, 2S]
    n, noise_offset, noise_row, grad_stoch_row, grad_stats_row, stats_row, out_row,
    S: tl.constexpr, KIND: tl.constexpr, OWN: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The statistics' gradient from the samples' and, with OWN, their own."""
    row, j, mask = _elements(n, S, BLOCK)
    grad = tl.load(grad_stoch + row * grad_stoch_row + j, mask, 0.0).to(ACC)
    of_std = tl.zeros_like(grad)
    if KIND > 0:
        s = sigmoid(tl.load(stats + row * stats_row + S + j, mask, 0.0).to(ACC) * 0.5)
        of_std = grad * noise_at(noise, noise_offset, row * noise_row + j, mask, KIND, True, ACC) * s * (1.0 - s)
    if OWN:
        grad += tl.load(grad_stats + row * grad_stats_row + j, mask, 0.0).to(ACC)
        of_std += tl.load(grad_stats + row * grad_stats_row + S + j, mask, 0.0).to(ACC)
    store(out + row * out_row + j, grad, mask)
    store(out + row * out_row + S + j, of_std, mask)


def group_width(classes: int) -> int:
    """Columns that a variable takes in a tile: a power of two, and two at least, for reductions."""
    return max(2, triton.next_power_of_2(classes))


def _tiling(rows: int, latent: Latent) -> tuple[tuple[int], dict[str, int]]:
    """Grid and block sizes of the kernels above."""
    if not latent.discrete:
        return (triton.cdiv(rows * latent.stoch, TILE // 8),), {"S": latent.stoch, "BLOCK": TILE // 8}
    width = group_width(latent.discrete)
    groups = min(max(1, TILE // width), triton.next_power_of_2(rows * latent.stoch))
    sizes = {"S": latent.stoch, "C": latent.discrete, "BG": groups, "CP": width}
    return (triton.cdiv(rows * latent.stoch, groups),), sizes


def sample_into(stats: Tensor, noise: Noise, latent: Latent, stoch: Tensor, narrow: Tensor | None) -> None:
    """Samples of ``stats [n, M]`` into ``stoch [n, L]`` and ``narrow [n, L]``; rows of any stride, contiguous."""
    if not stoch.numel():
        return
    grid, sizes = _tiling(len(stats), latent)
    common = {"KIND": noise.kind, "NARROW": narrow is not None, "ACC": accumulator(stats.dtype)}
    arguments = (
        stats, stats if noise.source is None else noise.source, stoch, stoch if narrow is None else narrow,
        len(stats), noise.offset, noise.row, stats.stride(0), stoch.stride(0),
        0 if narrow is None else narrow.stride(0),
    )  # fmt: skip
    with on(stats):
        if latent.discrete:
            sample_categorical_kernel[grid](*arguments, **common, **sizes)
        else:
            sample_gaussian_kernel[grid](*arguments, MIN_STD=latent.min_std, **common, **sizes)


def sample_backward_into(
    grad_stoch: Tensor, grad_stats: Tensor | None, stats: Tensor, noise: Noise, latent: Latent, out: Tensor
) -> None:
    """The gradient of ``stats [n, M]``, rounded to ``out [n, M]``, from the samples' ``[n, L]`` and its own."""
    if not out.numel():
        return
    grid, sizes = _tiling(len(stats), latent)
    own = stats if grad_stats is None else grad_stats
    rows = (grad_stoch.stride(0), own.stride(0), stats.stride(0), out.stride(0))
    common = {"OWN": grad_stats is not None, "ACC": accumulator(stats.dtype)}
    with on(stats):
        if latent.discrete:
            categorical_backward_kernel[grid](grad_stoch, own, stats, out, len(stats), *rows, **common, **sizes)
        else:
            source = stats if noise.source is None else noise.source
            gaussian_backward_kernel[grid](
                grad_stoch, own, stats, source, out, len(stats), noise.offset, noise.row, *rows,
                KIND=noise.kind, **common, **sizes,
            )  # fmt: skip


def sample_latent(stats: Tensor, noise: Tensor | None, latent: Latent) -> Tensor:
    """The sample ``[..., L]``, or the mode without noise, of ``stats [..., M]``: all steps at once, one launch.

    Args:
        stats: logits, or mean and the preactivation of std; float32 or float64.
        noise: ``[..., S, C]`` or ``[..., S]`` in the dtype of ``stats``, or an int64 scalar, its seed; None: modes.
        latent: the kind of latent.
    """
    flat = stats.reshape(-1, stats.shape[-1])
    width = latent.stoch * (latent.discrete or 1)
    stoch = torch.empty(len(flat), width, dtype=stats.dtype, device=stats.device)
    sample_into(flat, whole(noise, width), latent, stoch, None)
    return stoch.view(*stats.shape[:-1], width)


def sample_latent_backward(
    grad: Tensor, stats: Tensor, noise: Tensor | None, latent: Latent, sampled: bool
) -> Tensor | None:
    """The gradient of ``stats [..., M]`` from that of the sample, ``[..., L]``; None: modes of one-hots have none."""
    if latent.discrete and not sampled:
        return None
    flat, width = stats.reshape(-1, stats.shape[-1]).contiguous(), grad.shape[-1]
    out = torch.empty_like(flat)
    rows = grad.reshape(-1, width).contiguous()  # that of a sum is one number, expanded
    sample_backward_into(rows, None, flat, whole(noise, width), latent, out)
    return out.view(stats.shape)

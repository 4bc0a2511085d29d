r"""LayerNorm and gates of the GRU, forward and backward, a launch each; a program holds whole rows.

From the parts a = W [x, h⁻] + b of a row, 3D numbers (reset, candidate, update)::

    â = (a - mean)/σ,  σ² = var + ε;   [r, c, g] = γ∘â + β
    R = sigmoid(r),  N = tanh(R·c),  G = sigmoid(g - 1),  h = G·N + (1 - G)·h⁻

and back, with dh the sum of up to three gradients of h (its own, the carry of the step after, the head's)::

    dm = dh·G·(1 - N²);   dr = dm·c·R·(1 - R),  dc = dm·R,  dg = dh·(N - h⁻)·G·(1 - G)
    dâ = γ∘[dr, dc, dg];  da = (dâ - mean(dâ) - â·mean(dâ·â))/σ;   ∂h⁻ = (1 - G)·dh + (through W, elsewhere)

Since a program sees the whole row, mean and variance are those of the numbers that it holds, in two passes over
registers: the product before needs to leave no partial sums. Parts are stored in the dtype of the products, as PyTorch
would, which halves the largest array that the backward pass reads (15 x 2500 x 3072: 230 MB in bfloat16).

Floor for 2500 rows, D = 1024, bfloat16: 40 MB forward, 12 µs of an H100's 3.35 TB/s, less where the L2 cache has it.
"""
# Kernels are Triton, not Python: arguments are pointers.
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from apv_fast.reference.rssm_step import LAYER_NORM_EPS, UPDATE_BIAS

from .pointwise import exp, sigmoid, tanh
from .tiles import accumulator, on, store

TILE = 1024  # units that a program holds at least, three numbers each


@triton.jit
def _place(n, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    """(rows [BR, 1] in 64 bits, units [1, BD], mask)."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    unit = tl.arange(0, BD)[None, :]
    return row, unit, (row < n) & (unit < D)


@triton.jit
def _three(base, D: tl.constexpr, mask, ACC: tl.constexpr):
    """A number of each gate."""
    return (
        tl.load(base, mask, 0.0).to(ACC),
        tl.load(base + D, mask, 0.0).to(ACC),
        tl.load(base + 2 * D, mask, 0.0).to(ACC),
    )


@triton.jit
def _row_mean(a, b, c, D: tl.constexpr):
    """Mean [BR, 1] over a row's 3D numbers, which are 0 outside."""
    return (tl.sum(a + b + c, 1) / (3 * D))[:, None]


@triton.jit
def gates_kernel(
    parts, scale, offset, before, deter, narrow, norm,  # [n, 3D], [3D] twice, [n, D] three times, [n, 2]
    n, parts_row, before_row, deter_row, narrow_row, norm_row,
    D: tl.constexpr, EPS: tl.constexpr, UPDATE_BIAS: tl.constexpr, NARROW: tl.constexpr, ACC: tl.constexpr,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The state of BR rows, and mean and 1/σ of their parts; with NARROW the state also as an operand."""
    row, unit, mask = _place(n, D, BR, BD)
    r, c, g = _three(parts + row * parts_row + unit, D, mask, ACC)
    mean = _row_mean(r, c, g, D)
    r, c, g = tl.where(mask, r - mean, 0.0), tl.where(mask, c - mean, 0.0), tl.where(mask, g - mean, 0.0)
    rstd = 1.0 / tl.sqrt(_row_mean(r * r, c * c, g * g, D) + EPS)
    store(norm + row * norm_row, mean, row < n)
    store(norm + row * norm_row + 1, rstd, row < n)
    scale_r, scale_c, scale_g = _three(scale + unit, D, unit < D, ACC)
    offset_r, offset_c, offset_g = _three(offset + unit, D, unit < D, ACC)
    reset = sigmoid(r * rstd * scale_r + offset_r)
    candidate = tanh(reset * (c * rstd * scale_c + offset_c))
    update = sigmoid(g * rstd * scale_g + offset_g + UPDATE_BIAS)
    h = tl.load(before + row * before_row + unit, mask, 0.0).to(ACC)
    h = update * candidate + (1.0 - update) * h
    store(deter + row * deter_row + unit, h, mask)
    if NARROW:
        store(narrow + row * narrow_row + unit, h, mask)


@triton.jit
def gates_backward_kernel(
    grad, grad_deter, carry,  # [n, D] three times: through the head, the output's own, the carry: read and replaced
    parts, norm, scale, offset, before, grad_parts, grad_norm,  # [n, 3D], [n, 2], [3D] twice, [n, D], [n, 3D] twice
    n, grad_row, grad_deter_row, carry_row, parts_row, norm_row, before_row, grad_parts_row, grad_norm_row,
    D: tl.constexpr, UPDATE_BIAS: tl.constexpr, OWN: tl.constexpr, WEIGHTS: tl.constexpr, ACC: tl.constexpr,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradients of BR rows' parts; ``carry`` becomes (1 - G)·dh. With WEIGHTS also [dr, dc, dg], for γ and β."""
    row, unit, mask = _place(n, D, BR, BD)
    at = carry + row * carry_row + unit
    dh = tl.load(at, mask, 0.0).to(ACC) + tl.load(grad + row * grad_row + unit, mask, 0.0).to(ACC)
    if OWN:
        dh += tl.load(grad_deter + row * grad_deter_row + unit, mask, 0.0).to(ACC)
    mean = tl.load(norm + row * norm_row, row < n, 0.0).to(ACC)
    rstd = tl.load(norm + row * norm_row + 1, row < n, 0.0).to(ACC)
    r, c, g = _three(parts + row * parts_row + unit, D, mask, ACC)
    r, c, g = (r - mean) * rstd, (c - mean) * rstd, (g - mean) * rstd
    scale_r, scale_c, scale_g = _three(scale + unit, D, unit < D, ACC)
    offset_r, offset_c, offset_g = _three(offset + unit, D, unit < D, ACC)
    reset = sigmoid(r * scale_r + offset_r)
    gated = c * scale_c + offset_c
    candidate = tanh(reset * gated)
    update = sigmoid(g * scale_g + offset_g + UPDATE_BIAS)
    h = tl.load(before + row * before_row + unit, mask, 0.0).to(ACC)
    e = exp(-2.0 * tl.abs(reset * gated))
    dm = dh * update * (4.0 * e / ((1.0 + e) * (1.0 + e)))  # 1 - N², which cancels where tanh is saturated
    dr, dc = dm * gated * reset * (1.0 - reset), dm * reset
    dg = dh * (candidate - h) * update * (1.0 - update)
    store(at, (1.0 - update) * dh, mask)
    if WEIGHTS:
        out = grad_norm + row * grad_norm_row + unit
        store(out, dr, mask)
        store(out + D, dc, mask)
        store(out + 2 * D, dg, mask)
    dr, dc, dg = dr * scale_r, dc * scale_c, dg * scale_g
    mean = _row_mean(dr, dc, dg, D)
    slope = _row_mean(dr * r, dc * c, dg * g, D)
    out = grad_parts + row * grad_parts_row + unit
    store(out, (dr - mean - r * slope) * rstd, mask)
    store(out + D, (dc - mean - c * slope) * rstd, mask)
    store(out + 2 * D, (dg - mean - g * slope) * rstd, mask)


def _tiling(rows: int, deter: int) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and block sizes: 8 units of each gate a thread, or more where a row is longer than 32 warps take."""
    width = triton.next_power_of_2(deter)
    height = max(1, min(TILE // width, triton.next_power_of_2(rows)))
    return (triton.cdiv(rows, height),), {"BR": height, "BD": width, "num_warps": min(32, max(4, width // 256))}


def gates(
    parts: Tensor,
    scale: Tensor,
    offset: Tensor,
    before: Tensor,
    deter: Tensor,
    narrow: Tensor | None,
    norm: Tensor,
) -> None:
    """``deter [n, D]`` (and ``narrow``), ``norm [n, 2]`` from ``parts [n, 3D]`` and the state ``before``."""
    if not deter.numel():
        return
    grid, sizes = _tiling(*deter.shape)
    copy = deter if narrow is None else narrow
    with on(deter):
        gates_kernel[grid](
            parts, scale, offset, before, deter, copy, norm,
            len(deter), *(x.stride(0) for x in (parts, before, deter, copy, norm)),
            D=deter.shape[1], EPS=LAYER_NORM_EPS, UPDATE_BIAS=UPDATE_BIAS, NARROW=narrow is not None,
            ACC=accumulator(deter.dtype), **sizes,
        )  # fmt: skip


def gates_backward(
    grad: Tensor,
    grad_deter: Tensor | None,
    carry: Tensor,
    parts: Tensor,
    norm: Tensor,
    scale: Tensor,
    offset: Tensor,
    before: Tensor,
    grad_parts: Tensor,
    grad_norm: Tensor | None,
) -> None:
    """``grad_parts [n, 3D]``, ``grad_norm [n, 3D]`` if given, and the new ``carry [n, D]``; see the kernel."""
    if not carry.numel():
        return
    grid, sizes = _tiling(*carry.shape)
    own = grad if grad_deter is None else grad_deter
    of_norm = grad_parts if grad_norm is None else grad_norm
    with on(carry):
        gates_backward_kernel[grid](
            grad, own, carry, parts, norm, scale, offset, before, grad_parts, of_norm,
            len(carry), *(x.stride(0) for x in (grad, own, carry, parts, norm, before, grad_parts, of_norm)),
            D=carry.shape[1], UPDATE_BIAS=UPDATE_BIAS, OWN=grad_deter is not None, WEIGHTS=grad_norm is not None,
            ACC=accumulator(carry.dtype), **sizes,
        )  # fmt: skip


def norm_weight_grads(grad_norm: Tensor, parts: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of γ and β, ``[3D]``, of one step."""
    wide = grad_norm.dtype
    normalised = (parts.to(wide) - norm[:, :1]) * norm[:, 1:]
    return (grad_norm * normalised).sum(0), torch.sum(grad_norm, 0)

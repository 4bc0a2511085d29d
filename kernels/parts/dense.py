r"""Products over many rows with their epilogues fused: what imagination consists of.

With operands x [n, K] and weights w [columns, K] (any strides), every kernel computes ``x wᵀ`` in tiles, sums in
float32 (float64 for float64), and finishes the tile while it is on the chip::

    dense             out = act(x wᵀ + b) ∘ elu'(gate)
    dense_sample      ℓ = x wᵀ + b;  z = onehot(argmax(ℓ + γ))        a tile holds whole variables
    dense_softmax     ∂ℓ = ∂ℓ' + p·(∂z - Σ p·∂z),  ∂z = ∂z' + x wᵀ
    gru_backward      ∂x = (∂parts W_x) ∘ elu'(x);  ∂h = ∂h' + ∂parts W_h      one launch for both

ELU's derivative comes from its argument, which a layer leaves beside its output if there is a way back. From the output
it would be y + 1, in which a rounded y near -1 leaves no digits; PyTorch's has all of them.

One-hot latents enter as operands of a product and not as sums of gathered rows: for 2500 rows, S = 32 and 1024
columns in bfloat16 the gather would read 164 MB from the second-level cache, 30 µs at 5.5 TB/s, while the product is
5.2 GFLOP, 9 µs at 600 TFLOP/s; and the first latents need not be one-hot.

A variable of C classes takes a power of two of a tile's columns, those beyond C masked. Where that is wider than half a
tile, callers sample with a launch of its own (:mod:`apv_fast.kernels.parts.latent`).

Tiles are chosen by reasoning, from the dtype and from what fills the multiprocessors once: a
fixed short list (:mod:`apv_fast.kernels.parts.tiling`), so that no number of rows compiles anything of its own.
"""
# Kernels are Triton, not Python: arguments are pointers.
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from apv_fast.types import Latent

from .. import interpreting
from .latent import Noise, group_width, noise_at, one_hot, softmax_gradient
from .pointwise import elu, exp
from .tiles import accumulator, on, precision, product, store
from .tiling import INTERPRETED, Tile, choose_tile

GROUP = 8  # row tiles that walk over the columns together, so that weights and rows are read from the L2 cache
WIDEST = 128  # columns of a tile whose epilogue samples, or branches


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _tile(rows: int, columns: int, like: Tensor, widest: int = 256) -> Tile:
    """The tile for operands like this one."""
    if interpreting():
        return INTERPRETED
    kind = {torch.float64: "double", torch.float32: precision()}.get(like.dtype, "half")
    return choose_tile(rows, columns, kind, _multiprocessors(like.device), widest)


@triton.jit
def _place(n, ACROSS: tl.constexpr, BM: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, column tile) of this program."""
    program = tl.program_id(0)
    first = program // (GROUP * ACROSS) * GROUP
    height = tl.minimum(tl.cdiv(n, BM) - first, GROUP)
    within = program % (GROUP * ACROSS)
    return first + within % height, within // height


@triton.jit
def _rows(tile, n, BM: tl.constexpr):
    """(rows in 64 bits, which of them exist, the rows that are read): a row that does not exist reads the last one."""
    row = tile.to(tl.int64) * BM + tl.arange(0, BM)
    return row, row < n, tl.minimum(row, n - 1)


@triton.jit
def accumulate(
    acc, x, x_row, w, w_n, w_k, row, column, inside,
    K: tl.constexpr, EVEN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc + x[row] · w[column]ᵀ`` [BM, BN]; every row exists, and with EVEN every column, else those ``inside``."""
    k = tl.arange(0, BK)
    x_at = x + row[:, None] * x_row + k[None, :]
    w_at = w + column[None, :] * w_n + k[:, None] * w_k
    for start in range(0, K, BK):
        # Masks and not clamped indices: those would hide from the compiler that columns lie side by side.
        if K % BK == 0:
            a = tl.load(x_at)
            b = tl.load(w_at) if EVEN else tl.load(w_at, inside[None, :], 0.0)
        else:
            real = k < K - start
            a = tl.load(x_at, real[None, :], 0.0)
            b = tl.load(w_at, real[:, None], 0.0) if EVEN else tl.load(w_at, real[:, None] & inside[None, :], 0.0)
        acc = product(a, b, acc, PRECISION)
        x_at += BK
        w_at += BK * w_k
    return acc


@triton.jit
def _elu_slope(x):
    """ELU's derivative from its argument."""
    return tl.where(x > 0, 1.0, exp(tl.minimum(x, 0.0)))


@triton.jit
def dense_kernel(
    x, w, bias, other, out,  # [n, K], [COLUMNS, K], [COLUMNS], [n, COLUMNS] twice
    n, x_row, w_n, w_k, other_row, out_row,
    K: tl.constexpr, COLUMNS: tl.constexpr, BIAS: tl.constexpr, ELU: tl.constexpr, KEEP: tl.constexpr,
    GATED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A layer; ``other`` takes its activation's argument with KEEP, with GATED it is the one that a gradient meets."""
    row_tile, column_tile = _place(n, (COLUMNS + BN - 1) // BN, BM, GROUP)
    row, exists, read = _rows(row_tile, n, BM)
    column = column_tile * BN + tl.arange(0, BN)
    inside = column < COLUMNS
    acc = tl.zeros([BM, BN], ACC)
    acc = accumulate(acc, x, x_row, w, w_n, w_k, read, column, inside, K, COLUMNS % BN == 0, BK, PRECISION)
    mask = exists[:, None] & inside[None, :]
    if BIAS:
        acc += tl.load(bias + column, inside, 0.0).to(ACC)[None, :]
    other += row[:, None] * other_row + column[None, :]
    if KEEP:
        store(other, acc, mask)
    if ELU:
        acc = elu(acc)
    if GATED:
        acc *= _elu_slope(tl.load(other, mask, 0.0).to(ACC))
    store(out + row[:, None] * out_row + column[None, :], acc, mask)


@triton.jit
def _variables(column_tile, S: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, BN: tl.constexpr):
    """(column [BN] of the weights, whether it exists, class [1, CP]) of a tile of whole variables."""
    j = column_tile * BN + tl.arange(0, BN)
    label = tl.arange(0, CP)[None, :]
    if C == CP:
        return j, j < S * C, label
    return j // CP * C + j % CP, (j // CP < S) & (j % CP < C), label


@triton.jit
def _halves(x, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(x, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit(do_not_specialize=["noise_offset"])
def dense_sample_kernel(
    x, w, bias, noise, logit, stoch, narrow,  # [n, K], [S·C, K], [S·C], the noise or its seed, [n, S·C] three times
    n, noise_offset, noise_row, x_row, w_n, w_k, logit_row, stoch_row, narrow_row,
    K: tl.constexpr, S: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, KIND: tl.constexpr, NARROW: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Logits and one-hot samples."""
    row_tile, column_tile = _place(n, (S * CP + BN - 1) // BN, BM, GROUP)
    row, exists, read = _rows(row_tile, n, BM)
    column, inside, label = _variables(column_tile, S, C, CP, BN)
    EVEN: tl.constexpr = C == CP and S * C % BN == 0
    acc = tl.zeros([BM, BN], ACC)
    acc = accumulate(acc, x, x_row, w, w_n, w_k, read, column, inside, K, EVEN, BK, PRECISION)
    # In two halves, so that the numbers of the noise generator need not all be in registers at once.
    left, right = _halves(acc, BM, BN)
    for half in tl.static_range(2):
        part = left if half == 0 else right
        column, inside, label = _variables(column_tile * 2 + half, S, C, CP, BN // 2)
        mask = exists[:, None] & inside[None, :]
        part += tl.load(bias + column, inside, 0.0).to(ACC)[None, :]
        store(logit + row[:, None] * logit_row + column[None, :], part, mask)
        if KIND > 0:
            index = row[:, None] * noise_row + column[None, :]
            part += noise_at(noise, noise_offset, index, mask, KIND, False, ACC)
        z = tl.reshape(one_hot(tl.reshape(part, (BM * BN // 2 // CP, CP)), label, C), (BM, BN // 2))
        store(stoch + row[:, None] * stoch_row + column[None, :], z, mask)
        if NARROW:
            store(narrow + row[:, None] * narrow_row + column[None, :], z, mask)


@triton.jit
def dense_softmax_kernel(
    x, w, grad_stoch, grad_logit, logit, out,  # [n, K], [S·C, K], [n, S·C] four times
    n, x_row, w_n, w_k, grad_stoch_row, grad_logit_row, logit_row, out_row,
    K: tl.constexpr, S: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, STOCH: tl.constexpr, OWN: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits; with STOCH and OWN also of what came to samples and logits from elsewhere."""
    row_tile, column_tile = _place(n, (S * CP + BN - 1) // BN, BM, GROUP)
    row, exists, read = _rows(row_tile, n, BM)
    column, inside, label = _variables(column_tile, S, C, CP, BN)
    EVEN: tl.constexpr = C == CP and S * C % BN == 0
    acc = tl.zeros([BM, BN], ACC)
    acc = accumulate(acc, x, x_row, w, w_n, w_k, read, column, inside, K, EVEN, BK, PRECISION)
    mask = exists[:, None] & inside[None, :]
    if STOCH:
        acc += tl.load(grad_stoch + row[:, None] * grad_stoch_row + column[None, :], mask, 0.0).to(ACC)
    acc = tl.where(inside[None, :], acc, 0.0)
    value = tl.load(logit + row[:, None] * logit_row + column[None, :], mask, 0.0).to(ACC)
    value, acc = tl.reshape(value, (BM * BN // CP, CP)), tl.reshape(acc, (BM * BN // CP, CP))
    total = tl.reshape(softmax_gradient(value, acc, label, C), (BM, BN))
    if OWN:
        total += tl.load(grad_logit + row[:, None] * grad_logit_row + column[None, :], mask, 0.0).to(ACC)
    store(out + row[:, None] * out_row + column[None, :], total, mask)


@triton.jit
def gru_backward_kernel(
    grad, w, x, grad_x, carry,  # [n, K], [K, H + D], [n, H] twice, [n, D]: read and replaced
    n, grad_row, w_n, w_k, x_row, grad_x_row, carry_row,
    K: tl.constexpr, H: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Gradients of the GRU's input, before its activation, and of the state before, added to ``carry``."""
    OF_X: tl.constexpr = (H + BN - 1) // BN
    row_tile, column_tile = _place(n, OF_X + (D + BN - 1) // BN, BM, GROUP)
    row, exists, read = _rows(row_tile, n, BM)
    is_x = column_tile < OF_X
    width = tl.where(is_x, H, D)
    column = tl.where(is_x, column_tile, column_tile - OF_X) * BN + tl.arange(0, BN)
    inside = column < width
    w += tl.where(is_x, 0, H) * w_n
    EVEN: tl.constexpr = H % BN == 0 and D % BN == 0
    acc = tl.zeros([BM, BN], ACC)
    acc = accumulate(acc, grad, grad_row, w, w_n, w_k, read, column, inside, K, EVEN, BK, PRECISION)
    mask = exists[:, None] & inside[None, :]
    if is_x:
        acc *= _elu_slope(tl.load(x + row[:, None] * x_row + column[None, :], mask, 0.0).to(ACC))
        store(grad_x + row[:, None] * grad_x_row + column[None, :], acc, mask)
    else:
        at = carry + row[:, None] * carry_row + column[None, :]
        store(at, acc + tl.load(at, mask, 0.0), mask)


def _options(tile: Tile, like: Tensor) -> dict[str, Any]:
    return dict(ACC=accumulator(like.dtype), PRECISION=precision(), GROUP=GROUP, **tile._asdict())


def dense(
    out: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    elu: bool = False,
    keep: Tensor | None = None,
    gate: Tensor | None = None,
) -> None:
    """``act(x wᵀ + bias) ∘ elu'(gate)`` into ``out [n, columns]``, rounded to its dtype.

    Args:
        out: rows of any stride, contiguous; so are ``x``, ``keep`` and ``gate``.
        x: ``[n, K]``.
        w: ``[columns, K]`` of any strides, dtype of ``x``.
        bias: ``[columns]``.
        elu: the activation.
        keep: ``[n, columns]``, takes the activation's argument.
        gate: ``[n, columns]``, the argument of the ELU through which the result is a gradient; not both.
    """
    if not out.numel():
        return
    n, columns = out.shape
    tile = _tile(n, columns, x)
    other = next((each for each in (keep, gate) if each is not None), out)
    with on(out):
        dense_kernel[(triton.cdiv(n, tile.BM) * triton.cdiv(columns, tile.BN),)](
            x, w, out if bias is None else bias, other, out,
            n, x.stride(0), *w.stride(), other.stride(0), out.stride(0),
            K=x.shape[1], COLUMNS=columns, BIAS=bias is not None, ELU=elu, KEEP=keep is not None,
            GATED=gate is not None, **_options(tile, x),
        )  # fmt: skip


def fits(latent: Latent, rows: int, like: Tensor) -> bool:
    """Whether variables of this latent fit a tile, so that the two functions below can be used."""
    width = group_width(latent.discrete)
    return latent.discrete > 0 and 2 * width <= _tile(rows, latent.stoch * width, like, WIDEST).BN


def dense_sample(
    x: Tensor,
    w: Tensor,
    bias: Tensor,
    noise: Noise,
    latent: Latent,
    logit: Tensor,
    stoch: Tensor,
    narrow: Tensor | None,
) -> None:
    """Logits ``x wᵀ + bias``, their samples, and the samples as operands (``narrow``), all ``[n, S·C]``."""
    if not stoch.numel():
        return
    n, width = len(x), group_width(latent.discrete)
    tile = _tile(n, latent.stoch * width, x, WIDEST)
    copy = stoch if narrow is None else narrow
    with on(x):
        dense_sample_kernel[(triton.cdiv(n, tile.BM) * triton.cdiv(latent.stoch * width, tile.BN),)](
            x, w, bias, x if noise.source is None else noise.source, logit, stoch, copy,
            n, noise.offset, noise.row, x.stride(0), *w.stride(), logit.stride(0), stoch.stride(0), copy.stride(0),
            K=x.shape[1], S=latent.stoch, C=latent.discrete, CP=width, KIND=noise.kind, NARROW=narrow is not None,
            **_options(tile, x),
        )  # fmt: skip


def dense_softmax(
    x: Tensor,
    w: Tensor,
    grad_stoch: Tensor | None,
    grad_logit: Tensor | None,
    logit: Tensor,
    latent: Latent,
    out: Tensor,
) -> None:
    """Gradient of ``logit [n, S·C]`` into ``out``: that of the samples is ``x wᵀ + grad_stoch``."""
    if not out.numel():
        return
    n, width = len(x), group_width(latent.discrete)
    tile = _tile(n, latent.stoch * width, x, WIDEST)
    of_stoch, own = (logit if grad is None else grad for grad in (grad_stoch, grad_logit))
    with on(x):
        dense_softmax_kernel[(triton.cdiv(n, tile.BM) * triton.cdiv(latent.stoch * width, tile.BN),)](
            x, w, of_stoch, own, logit, out,
            n, x.stride(0), *w.stride(), of_stoch.stride(0), own.stride(0), logit.stride(0), out.stride(0),
            K=x.shape[1], S=latent.stoch, C=latent.discrete, CP=width, STOCH=grad_stoch is not None,
            OWN=grad_logit is not None, **_options(tile, x),
        )  # fmt: skip


def gru_backward(grad: Tensor, w: Tensor, x: Tensor, grad_x: Tensor, carry: Tensor) -> None:
    """``grad_x [n, H]`` from the gradient of the GRU's parts ``[n, 3D]``; that of the state is added to ``carry``.

    ``w [3D, H + D]`` are the GRU's weights, ``x [n, H]`` the arguments of the ELU that it reads.
    """
    if not carry.numel():
        return
    n, hidden, deter = len(grad), x.shape[1], carry.shape[1]
    tile = _tile(n, hidden + deter, grad, WIDEST)
    across = triton.cdiv(hidden, tile.BN) + triton.cdiv(deter, tile.BN)
    with on(grad):
        gru_backward_kernel[(triton.cdiv(n, tile.BM) * across,)](
            grad, w, x, grad_x, carry,
            n, grad.stride(0), w.stride(1), w.stride(0), x.stride(0), grad_x.stride(0), carry.stride(0),
            K=grad.shape[1], H=hidden, D=deter, **_options(tile, grad),
        )  # fmt: skip

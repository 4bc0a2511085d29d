r"""The balanced KL loss of categorical and Gaussian latents, fused: two launches forward, one backward.

With p the latent whose side is called lhs (the posterior; with ``forward`` the prior) and q the other, a step costs::

    KL = Σ_s Σ_c p·(log p - log q)                                 categorical: log p, log q by log-softmax
    KL = Σ_s ½(ρ² + δ² - 1) - log ρ,  ρ = σp/σq, δ = (μp - μq)/σq   Gaussian

The two halves of the loss have the same value and differ only in where their gradient goes, so the loss is one number,
``L = max(mean KL, free)``, or with ``per_step`` (``free_avg`` off, or balance ½) ``mean max(KL, free)``. Backward, with
the cotangent g, N steps and the weights wp, wq of the halves::

    a          = g/N where the limit is not reached (of the mean, or of the step), else 0
    ∂L/∂logit_p = a·wp·p·(log p - log q - KL_s)    ∂L/∂logit_q = a·wq·(q - p)
    ∂L/∂μp = a·wp·δ/σq      ∂L/∂σp = a·wp·(ρ/σq - 1/σp)      ∂L/∂μq = -a·wq·δ/σq      ∂L/∂σq = a·wq·(1 - ρ² - δ²)/σq

One program reads one step once and keeps it on the chip: log-softmax, divergence and gradient never go to memory. A
second launch of one program adds the steps up in a fixed order: no atomics, so every run has the same bits, and the
backward reads the mean that it wrote, so nothing waits for the host. (A single launch whose last program finishes would
need a counter that outlives the call, or one more launch to clear it.) The backward recomputes both log-softmaxes:
storing them would cost their bytes twice. Storage is float64, float32, bfloat16 or float16; arithmetic is float64 for
float64 and float32 for the others. The gradient is not differentiable again.

Floor, B·T = 2500 and S = C = 32 in float32: forward reads 20.5 MB, 6.1 µs of an H100's 3.35 TB/s; backward reads them
again and writes as much, 12.2 µs.

Source: Hafner et al., "Mastering Atari with Discrete World Models" (2021), algorithm 2.
"""
# Kernels are Triton, not Python: arguments are pointers.
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from apv_fast.ops.kl_balance import Divergence, balanced, like_divergence
from apv_fast.ops.op import Gradients, Kernel

from .parts.pointwise import divide, exp
from .parts.tiles import on

TILE = 2048  # numbers of each latent that a program holds at a time
FINISH = 1024  # steps that the finishing program adds at a time


@triton.jit
def _log_softmax(logit, offset, row, column, ACC: tl.constexpr):
    """Of a tile [BS, BC]; ``row`` and ``column`` say what is inside. Beyond it two latents are equal: no KL."""
    x = tl.load(logit + offset, row & column, 0.0).to(ACC)
    x = tl.where(column, x, -1e30)  # not -inf, whose difference of two is NaN
    x = x - tl.max(x, 1)[:, None]
    return x - tl.log(tl.sum(exp(x), 1))[:, None]


@triton.jit
def _step(stride_b, stride_t, T):
    """Offset of this program's step, in 64 bits."""
    n = tl.program_id(0).to(tl.int64)
    return (n // T) * stride_b + (n % T) * stride_t


@triton.jit
def categorical_forward_kernel(
    p, q, value,  # [B, T, S, C] twice, [B·T]
    p_b, p_t, p_s, p_c, q_b, q_t, q_s, q_c,  # strides, in elements
    T, S: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """KL(p ‖ q) of one step."""
    p += _step(p_b, p_t, T)
    q += _step(q_b, q_t, T)
    c = tl.arange(0, BC)[None, :]
    total = tl.zeros([BS], ACC)
    for chunk in range((S + BS - 1) // BS):
        s = chunk * BS + tl.arange(0, BS)[:, None]
        log_p = _log_softmax(p, s * p_s + c * p_c, s < S, c < C, ACC)
        log_q = _log_softmax(q, s * q_s + c * q_c, s < S, c < C, ACC)
        total += tl.sum(exp(log_p) * (log_p - log_q), 1)
    tl.store(value + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _coefficient(grad, value, mean, FREE: tl.constexpr, PER_STEP: tl.constexpr):
    """a: what a nat of this program's step adds to the loss, times the cotangent."""
    reached = tl.load(value + tl.program_id(0)) if PER_STEP else tl.load(mean)
    share = divide(tl.load(grad).to(reached.dtype), tl.num_programs(0).to(reached.dtype))
    return tl.where(reached >= FREE, share, 0.0)


@triton.jit
def categorical_backward_kernel(
    grad, p, q, value, mean, grad_p, grad_q,  # [], [B, T, S, C] twice, [B·T], [], contiguous [B, T, S, C] twice
    p_b, p_t, p_s, p_c, q_b, q_t, q_s, q_c,  # strides, in elements
    T, S: tl.constexpr, C: tl.constexpr, P_WEIGHT: tl.constexpr, Q_WEIGHT: tl.constexpr, FREE: tl.constexpr,
    PER_STEP: tl.constexpr, ACC: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradients of the logits of one step."""
    p += _step(p_b, p_t, T)
    q += _step(q_b, q_t, T)
    a = _coefficient(grad, value, mean, FREE, PER_STEP)
    c = tl.arange(0, BC)[None, :]
    for chunk in range((S + BS - 1) // BS):
        s = chunk * BS + tl.arange(0, BS)[:, None]
        log_p = _log_softmax(p, s * p_s + c * p_c, s < S, c < C, ACC)
        log_q = _log_softmax(q, s * q_s + c * q_c, s < S, c < C, ACC)
        prob_p = exp(log_p)
        ratio = log_p - log_q
        of_p = prob_p * (ratio - tl.sum(prob_p * ratio, 1)[:, None])
        of_q = exp(log_q) - prob_p
        inside = (s < S) & (c < C)
        out = tl.program_id(0).to(tl.int64) * (S * C) + s * C + c
        tl.store(grad_p + out, (a * P_WEIGHT * of_p).to(grad_p.dtype.element_ty), inside)
        tl.store(grad_q + out, (a * Q_WEIGHT * of_q).to(grad_q.dtype.element_ty), inside)


@triton.jit
def _ratios(p_mean, p_std, q_mean, q_std, offsets, inside, ACC: tl.constexpr):
    """(ρ, δ, σp, σq) of one step's latents; outside: two equal normals."""
    of_pm, of_ps, of_qm, of_qs = offsets
    sigma_p = tl.load(p_std + of_ps, inside, 1.0).to(ACC)
    sigma_q = tl.load(q_std + of_qs, inside, 1.0).to(ACC)
    difference = tl.load(p_mean + of_pm, inside, 0.0).to(ACC) - tl.load(q_mean + of_qm, inside, 0.0).to(ACC)
    return divide(sigma_p, sigma_q), divide(difference, sigma_q), sigma_p, sigma_q


@triton.jit
def normal_forward_kernel(
    p_mean, p_std, q_mean, q_std, value,  # [B, T, S] four times, [B·T]
    pm_b, pm_t, pm_s, ps_b, ps_t, ps_s, qm_b, qm_t, qm_s, qs_b, qs_t, qs_s,  # strides, in elements
    T, S: tl.constexpr, ACC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """KL(p ‖ q) of one step."""
    s = tl.arange(0, BS)
    offsets = (
        _step(pm_b, pm_t, T) + s * pm_s, _step(ps_b, ps_t, T) + s * ps_s,
        _step(qm_b, qm_t, T) + s * qm_s, _step(qs_b, qs_t, T) + s * qs_s,
    )  # fmt: skip
    rho, delta, _, _ = _ratios(p_mean, p_std, q_mean, q_std, offsets, s < S, ACC)
    tl.store(value + tl.program_id(0), tl.sum(0.5 * (rho * rho + delta * delta - 1.0) - tl.log(rho), 0))


@triton.jit
def normal_backward_kernel(
    grad, p_mean, p_std, q_mean, q_std, value, mean,  # [], [B, T, S] four times, [B·T], []
    grad_p_mean, grad_p_std, grad_q_mean, grad_q_std,  # contiguous [B, T, S]
    pm_b, pm_t, pm_s, ps_b, ps_t, ps_s, qm_b, qm_t, qm_s, qs_b, qs_t, qs_s,  # strides, in elements
    T, S: tl.constexpr, P_WEIGHT: tl.constexpr, Q_WEIGHT: tl.constexpr, FREE: tl.constexpr,
    PER_STEP: tl.constexpr, ACC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Gradients of the statistics of one step."""
    s = tl.arange(0, BS)
    offsets = (
        _step(pm_b, pm_t, T) + s * pm_s, _step(ps_b, ps_t, T) + s * ps_s,
        _step(qm_b, qm_t, T) + s * qm_s, _step(qs_b, qs_t, T) + s * qs_s,
    )  # fmt: skip
    rho, delta, sigma_p, sigma_q = _ratios(p_mean, p_std, q_mean, q_std, offsets, s < S, ACC)
    a = _coefficient(grad, value, mean, FREE, PER_STEP)
    out = tl.program_id(0).to(tl.int64) * S + s
    of_mean = a * divide(delta, sigma_q)
    of_p_std = a * (divide(rho, sigma_q) - divide(sigma_p * 0.0 + 1.0, sigma_p))
    of_q_std = a * divide(1.0 - rho * rho - delta * delta, sigma_q)
    tl.store(grad_p_mean + out, (P_WEIGHT * of_mean).to(grad_p_mean.dtype.element_ty), s < S)
    tl.store(grad_p_std + out, (P_WEIGHT * of_p_std).to(grad_p_std.dtype.element_ty), s < S)
    tl.store(grad_q_mean + out, (-Q_WEIGHT * of_mean).to(grad_q_mean.dtype.element_ty), s < S)
    tl.store(grad_q_std + out, (Q_WEIGHT * of_q_std).to(grad_q_std.dtype.element_ty), s < S)


@triton.jit(do_not_specialize=["n"])  # n = 1 would become a Python number
def finish_kernel(
    value, loss, mean,  # [n], [], []
    n, FREE: tl.constexpr, PER_STEP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the mean of the steps and the loss, in an order that only n decides."""
    total = tl.zeros([BLOCK], tl.float64)
    limited = tl.zeros([BLOCK], tl.float64)
    start = n * 0
    while start < n:
        i = start + tl.arange(0, BLOCK)
        nats = tl.load(value + i, i < n, 0.0)
        total += nats.to(tl.float64)
        limited += tl.where(i < n, tl.where(nats < FREE, FREE, nats), 0.0).to(tl.float64)
        start += BLOCK
    average = (tl.sum(total, 0) / n.to(tl.float64)).to(ACC)  # as the backward will read it
    tl.store(mean, average)
    if PER_STEP:
        tl.store(loss, (tl.sum(limited, 0) / n.to(tl.float64)).to(ACC))
    else:
        tl.store(loss, tl.where(average < FREE, FREE, average))


def _constants(tensor: Tensor) -> dict[str, Any]:
    """Compile-time sizes of a kernel over ``tensor``: [B, T, S, C] or [B, T, S]."""
    acc = tl.float64 if tensor.dtype == torch.float64 else tl.float32
    sizes = dict(zip("SC", tensor.shape[2:], strict=False))
    powers = {name: triton.next_power_of_2(size) for name, size in sizes.items()}
    if "C" in powers:
        powers["S"] = max(1, min(powers["S"], TILE // powers["C"]))
    warps = 4 if "C" in powers else 1
    return dict(T=tensor.shape[1], **sizes, ACC=acc, **{f"B{name}": size for name, size in powers.items()}) | {
        "num_warps": warps
    }


def _strides(statistics: list[Tensor]) -> list[int]:
    return [stride for tensor in statistics for stride in tensor.stride()]


# Settings are compile-time constants of the kernels, strides are free.


def _forward(call: Divergence, keep: bool) -> list[Tensor]:
    statistics, first = call.statistics, call.statistics[0]
    loss, value, mean = like_divergence(call, True)
    if not first.numel():
        value.zero_()
    constants, limit = _constants(first), {"FREE": call.free, "PER_STEP": call.per_step}
    with on(first):
        if first.numel():
            kernel = categorical_forward_kernel if first.dim() == 4 else normal_forward_kernel
            kernel[(value.numel(),)](*statistics, value, *_strides(statistics), **constants)
        finish_kernel[(1,)](value, loss, mean, value.numel(), **limit, ACC=constants["ACC"], BLOCK=FINISH)
    return [loss, value, mean] if keep else [loss, value]


def _backward(call: Divergence, results: list[Tensor], grads: list[Tensor | None], needs: frozenset[str]) -> Gradients:
    (_, value, mean), grad = results, grads[0]
    statistics, first = call.statistics, call.statistics[0]
    gradients = [tensor.new_empty(tensor.shape) for tensor in statistics]
    if first.numel():
        kernel = categorical_backward_kernel if first.dim() == 4 else normal_backward_kernel
        with on(first):
            kernel[(value.numel(),)](
                grad, *statistics, value, mean, *gradients, *_strides(statistics), **_constants(first),
                P_WEIGHT=call.p_weight, Q_WEIGHT=call.q_weight, FREE=call.free, PER_STEP=call.per_step,
            )  # fmt: skip
    return {"statistics": gradients}


kl_balance, kl_balance_normal = balanced(
    Kernel(
        "kl_balance_triton",
        Divergence,
        outputs=2,
        forward=_forward,
        backward=_backward,
        fake=like_divergence,
        constant=lambda _: [1],
    )
)

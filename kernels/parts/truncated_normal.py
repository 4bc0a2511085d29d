r"""Actions of the continuous actor, sampled and differentiated, one launch each.

From an actor's head (o, ρ) and a uniform u, the normal truncated to [-1, 1] by the inverse of its distribution::

    μ = tanh(o),  σ = 2·sigmoid(ρ/2) + min_std,   l = (-1 - μ)/σ,  h = (1 - μ)/σ
    ξ = Φ⁻¹((1 - u)·Φ(l) + u·Φ(h)),   a = clip(μ + σ·ξ, ±(1 - 1e-6)), the clip with a straight-through gradient
    ∂a/∂μ = 1 - ((1 - u)·φ(l) + u·φ(h))/φ(ξ)
    ∂a/∂σ = ξ - ((1 - u)·φ(l)·l + u·φ(h)·h)/φ(ξ)
    ∂μ/∂o = 1 - μ²,   ∂σ/∂ρ = s·(1 - s),  s = sigmoid(ρ/2)

All of it in float64, which a few numbers a row can afford: in float32 Φ rounds to 1 and the tails are lost. ξ is
clamped into [l, h], where it lies but for rounding, so that the ratios φ(l)/φ(ξ) = exp((ξ² - l²)/2) cannot overflow.
Φ⁻¹ is Wichura's algorithm AS 241 (Applied Statistics 37, 1988), 16 digits.
"""
# Kernels are Triton, not Python: arguments are pointers.
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from apv_fast.reference.distributions import CLIP

from .latent import Noise
from .pointwise import sigmoid, tanh, uniform
from .tiles import on, store

BLOCK = 128  # one number a thread


@triton.jit
def normal_cdf(x):
    """Φ(x) of a float64 tensor, to 1e-16 absolute."""
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit
def normal_quantile(p):
    """Φ⁻¹(p) of a float64 tensor inside (0, 1)."""
    q = p - 0.5
    r = 0.180625 - q * q
    a = ((((((2509.0809287301226727 * r + 33430.575583588128105) * r + 67265.770927008700853) * r
        + 45921.953931549871457) * r + 13731.693765509461125) * r + 1971.5909503065514427) * r
        + 133.14166789178437745) * r + 3.3871328727963666080  # fmt: skip
    b = ((((((5226.4952788528545610 * r + 28729.085735721942674) * r + 39307.895800092710610) * r
        + 21213.794301586595867) * r + 5394.1960214247511077) * r + 687.18700749205790830) * r
        + 42.313330701600911252) * r + 1.0  # fmt: skip
    middle = q * a / b
    r = tl.sqrt(-tl.log(tl.where(q < 0, p, 1.0 - p)))
    s = r - 1.6
    c = ((((((7.74545014278341407640e-4 * s + 2.27238449892691845833e-2) * s + 2.41780725177450611770e-1) * s
        + 1.27045825245236838258) * s + 3.64784832476320460504) * s + 5.76949722146069140550) * s
        + 4.63033784615654529590) * s + 1.42343711074968357734  # fmt: skip
    d = ((((((1.05075007164441684324e-9 * s + 5.47593808499534494600e-4) * s + 1.51986665636164571966e-2) * s
        + 1.48103976427480074590e-1) * s + 6.89767334985100004550e-1) * s + 1.67638483018380384940) * s
        + 2.05319162663775882187) * s + 1.0  # fmt: skip
    s = r - 5.0
    e = ((((((2.01033439929228813265e-7 * s + 2.71155556874348757815e-5) * s + 1.24266094738807843860e-3) * s
        + 2.65321895265761230930e-2) * s + 2.96560571828504891230e-1) * s + 1.78482653991729133580) * s
        + 5.46378491116411436990) * s + 6.65790464350110377720  # fmt: skip
    f = ((((((2.04426310338993978564e-15 * s + 1.42151175831644588870e-7) * s + 1.84631831751005468180e-5) * s
        + 7.86869131145613259100e-4) * s + 1.48753612908506148525e-2) * s + 1.36929880922735805310e-1) * s
        + 5.99832206555887937690e-1) * s + 1.0  # fmt: skip
    tail = tl.where(r <= 5.0, c / d, e / f)
    return tl.where(tl.abs(q) <= 0.425, middle, tl.where(q < 0, -tail, tail))


@triton.jit
def _place(n, A: tl.constexpr, BLOCK: tl.constexpr):
    """(row in 64 bits, action, mask) of this program's numbers."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return i // A, i % A, i // A < n


@triton.jit
def _sample(head, noise, noise_offset, index, mask, A: tl.constexpr, MIN_STD: tl.constexpr, SEED: tl.constexpr):
    """(μ, s, σ, l, h, u, ξ) from the heads of one action a lane."""
    u = uniform(tl.load(noise), noise_offset + index) if SEED else tl.load(noise + index, mask, 0.5)
    u = u.to(tl.float64)
    loc = tanh(tl.load(head, mask, 0.0).to(tl.float64))
    s = sigmoid(tl.load(head + A, mask, 0.0).to(tl.float64) * 0.5)
    scale = 2.0 * s + MIN_STD
    low, high = (-1.0 - loc) / scale, (1.0 - loc) / scale
    cdf = (1.0 - u) * normal_cdf(low) + u * normal_cdf(high)
    cdf = tl.minimum(tl.maximum(cdf, 1e-300), 1.0 - 1.1102230246251565e-16)
    normal = tl.minimum(tl.maximum(normal_quantile(cdf), low), high)
    return loc, s, scale, low, high, u, normal


@triton.jit(do_not_specialize=["noise_offset"])
def sample_kernel(
    head, noise, action, narrow,  # [n, 2A], uniforms or their seed, [n, A] twice
    n, noise_offset, noise_row, head_row, action_row, narrow_row,
    A: tl.constexpr, MIN_STD: tl.constexpr, CLIP: tl.constexpr, SEED: tl.constexpr, NARROW: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK actions; with NARROW also as operands of the next product."""
    row, j, mask = _place(n, A, BLOCK)
    loc, _, scale, _, _, _, normal = _sample(
        head + row * head_row + j, noise, noise_offset, row * noise_row + j, mask, A, MIN_STD, SEED
    )
    a = tl.minimum(tl.maximum(loc + scale * normal, CLIP - 1.0), 1.0 - CLIP)
    store(action + row * action_row + j, a, mask)
    if NARROW:
        store(narrow + row * narrow_row + j, a.to(action.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["noise_offset"])
def backward_kernel(
    grad, head, noise, grad_head,  # [n, A], [n, 2A], uniforms or their seed, [n, 2A]
    n, noise_offset, noise_row, grad_row, head_row, grad_head_row,
    A: tl.constexpr, MIN_STD: tl.constexpr, SEED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the heads of BLOCK actions."""
    row, j, mask = _place(n, A, BLOCK)
    loc, s, _, low, high, u, normal = _sample(
        head + row * head_row + j, noise, noise_offset, row * noise_row + j, mask, A, MIN_STD, SEED
    )
    of_low = (1.0 - u) * tl.exp(0.5 * (normal * normal - low * low))
    of_high = u * tl.exp(0.5 * (normal * normal - high * high))
    g = tl.load(grad + row * grad_row + j, mask, 0.0).to(tl.float64)
    out = grad_head + row * grad_head_row + j
    store(out, g * (1.0 - of_low - of_high) * (1.0 - loc * loc), mask)
    store(out + A, g * (normal - of_low * low - of_high * high) * s * (1.0 - s), mask)


def sample(head: Tensor, noise: Noise, min_std: float, action: Tensor, narrow: Tensor | None) -> None:
    """Actions of ``head [n, 2A]`` (out, then std) into ``action [n, A]`` and ``narrow [n, A]``."""
    assert noise.source is not None
    n, actions = action.shape
    copy = action if narrow is None else narrow
    with on(head):
        sample_kernel[(triton.cdiv(n * actions, BLOCK),)](
            head, noise.source, action, copy,
            n, noise.offset, noise.row, head.stride(0), action.stride(0), copy.stride(0),
            A=actions, MIN_STD=min_std, CLIP=CLIP, SEED=not noise.source.is_floating_point(),
            NARROW=narrow is not None, BLOCK=BLOCK, num_warps=BLOCK // 32,
        )  # fmt: skip


def sample_backward(grad: Tensor, head: Tensor, noise: Noise, min_std: float, grad_head: Tensor) -> None:
    """Gradient ``[n, 2A]`` of the head from that of the action, ``[n, A]``."""
    assert noise.source is not None
    n, actions = grad.shape
    with on(head):
        backward_kernel[(triton.cdiv(n * actions, BLOCK),)](
            grad, head, noise.source, grad_head,
            n, noise.offset, noise.row, grad.stride(0), head.stride(0), grad_head.stride(0),
            A=actions, MIN_STD=min_std, SEED=not noise.source.is_floating_point(), BLOCK=BLOCK,
            num_warps=BLOCK // 32,
        )  # fmt: skip

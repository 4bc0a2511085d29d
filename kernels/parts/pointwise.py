"""Device functions that several kernels share: activations, and the counter-based noise.

Only what Triton's interpreter can run: no libdevice, no inline assembly. float32 errors are a few units in the last
place: ``tl.exp`` multiplies by log2(e) first, which costs |x| of them, and e^x - 1 cancels. float64 takes the plain
formulas. The noise is that of :mod:`apv_fast.reference.noise`: Philox-4x32-10 with the seed as key and the flat index
of an element as counter, so it does not depend on how a kernel is tiled.
"""
# Kernels are Triton, not Python.
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _reduce(x):
    """(2^n, e^r - 1) with e^x = 2^n·e^r and |r| ≤ ln(2)/2; Cody and Waite's two-part ln(2)."""
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693359375) + n * 2.1219444005469058e-4
    p = 1 / 2 + r * (1 / 6 + r * (1 / 24 + r * (1 / 120 + r * (1 / 720 + r * (1 / 5040)))))
    return tl.exp2(n), r + r * r * p


@triton.jit
def exp(x):
    """e^x of a float32 (or float64) tensor."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:  # not left out: what follows a return is compiled too
        scale, p = _reduce(tl.maximum(tl.minimum(x, 89.0), -104.0))
        return scale * p + scale


@triton.jit
def expm1(x):
    """e^x - 1 for x ≤ 0, without the cancellation near 0."""
    if x.dtype == tl.float64:
        return tl.exp(x) - 1.0
    else:
        scale, p = _reduce(tl.maximum(x, -40.0))
        return scale * p + (scale - 1.0)


@triton.jit
def divide(x, y):
    """x/y, rounded once: Triton's float32 division is wrong by up to two units in the last place."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x), of both signs without overflow: e^-|x| is at most 1."""
    e = exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def tanh(x):
    """(1 - e^-2|x|) / (1 + e^-2|x|) with the sign of x."""
    e = expm1(-2.0 * tl.abs(x))
    t = -e / (2.0 + e)
    return tl.where(x >= 0, t, -t)


@triton.jit
def elu(x):
    """X where positive, else e^x - 1."""
    return tl.where(x > 0, x, expm1(tl.minimum(x, 0.0)))


@triton.jit
def elu_grad(y):
    """The derivative of ELU from its output y: 1 where positive, else y + 1."""
    return tl.where(y > 0, 1.0, y + 1.0)


@triton.jit
def _words(seed, index):
    """Philox's first two words for a 64-bit seed and element indices below 2^32."""
    index = index.to(tl.uint32)
    zero = index * 0
    a, b, _, _ = tl.philox(seed, index, zero, zero, zero)
    return a, b


@triton.jit
def _open_unit(word):
    """A uniform in (0, 1) with 23 bits, whose ends and complement float32 holds exactly."""
    return ((word >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0)


@triton.jit
def uniform(seed, index):
    """Uniforms in (0, 1), float32: noise of the truncated normal's samples."""
    a, _ = _words(seed, index)
    return _open_unit(a)


@triton.jit
def gumbel(seed, index):
    """Gumbel noise -log(-log u), float32: categorical samples are argmax(logit + noise)."""
    return -tl.log(-tl.log(uniform(seed, index)))


@triton.jit
def normal(seed, index):
    """Standard normals, float32, by Box and Muller."""
    a, b = _words(seed, index)
    radius = tl.sqrt(-2.0 * tl.log(_open_unit(a)))
    return radius * tl.cos(6.283185307179586 * _open_unit(b))

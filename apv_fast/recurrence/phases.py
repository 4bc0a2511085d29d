"""The recurrence of the posterior scan, cut free of all that can be done before or after it.

One step of the forward recurrence, in five phases with a barrier after each (rows b of the batch, time t)::

    1  x_t     = elu(inputs.x_t + keep_t·W_stoch z_{t-1})        one-hot z: a sum of S rows; at t = 0 it is hoisted
    2  parts_t = W_gru [x_t, keep_t·h_{t-1}] + b_gru              and each tile's (mean, M2) for the LayerNorm
    3  h_t     = gates(LayerNorm(parts_t), keep_t·h_{t-1})
    4  y_t     = elu(inputs.obs_t + W_obs h_t)
    5  stats_t = W_dist y_t + b_dist;  z_t = sample(stats_t)

The way back has two carries, dh and the gradient dx_{t+1} of phase 1's preactivation, and four phases::

    1  dz      = grads.stoch_t + keep_{t+1}·W_stochᵀ dx_{t+1};  dstats_t = grads.stats_t + (dz through the sample)
    2  dy_t    = elu'(y_t)·W_distᵀ dstats_t
    3  dh_t    = grads.deter_t + W_obsᵀ dy_t + carry;  dnorm_t = gates' (and each tile's sums for the LayerNorm)
    4  dparts_t = LayerNorm'(dnorm_t);  [dx_t, carry] = W_gruᵀ dparts_t;  dx_t ·= elu'(x_t)
                                        carry = keep_t·(carry + (1 - g_t)·dh_t)

Every weight's gradient is one product over all B·T afterwards. States, statistics and LayerNorm are in the state dtype
(float32, or float64 for float64 weights); what products read (x, y, the d's) is in the weights' dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from apv_fast.reference.noise import whole_noise
from apv_fast.types import Latent, RSSMParams, state_dtype


class ScanWeights(NamedTuple):
    """What the recurrence reads; any strides, the weights' dtype. L = S·C or S; M = S·C or 2·S."""

    stoch: Tensor  # [H, L] img_in's columns for stoch
    gru: Tensor  # [3D, H + D]
    gru_bias: Tensor  # [3D]
    norm_weight: Tensor  # [3D]
    norm_bias: Tensor  # [3D]
    obs: Tensor  # [H, D] obs_out's columns for deter
    dist: Tensor  # [M, H] obs_dist
    dist_bias: Tensor  # [M]


class ScanInputs(NamedTuple):
    """What the recurrence adds to at every step, computed before it."""

    x: Tensor  # [B, T, H] weights' dtype: img_in's bias and action part, at t = 0 the first stoch's part too
    obs: Tensor  # [B, T, H] weights' dtype: obs_out's bias and embedding part


class ScanStart(NamedTuple):
    """Where the recurrence starts, and what chooses its samples."""

    keep: Tensor  # [B, T] bool: not is_first
    deter: Tensor  # [B, D] state dtype: before the first step
    noise: Tensor | None  # [B, T, S, C] or [B, T, S] state dtype; an int64 scalar: counter-based, its seed; None: modes


class Trace(NamedTuple):
    """What the recurrence leaves: outputs, and what the way back reads; contiguous."""

    deter: Tensor  # [B, T, D] state dtype
    stoch: Tensor  # [B, T, L] state dtype: one-hot, or the Gaussian sample
    stats: Tensor  # [B, T, M] state dtype: logits, or mean and the preactivation of std
    x: Tensor  # [B, T, H] weights' dtype: elu of phase 1
    parts: Tensor  # [B, T, 3D] state dtype: before LayerNorm
    norm: Tensor  # [B, T, 2] state dtype: LayerNorm's mean and 1/std
    y: Tensor  # [B, T, H] weights' dtype: elu of phase 4


class TraceGrads(NamedTuple):
    """Gradients of the outputs that come from outside of the recurrence; None: zeros. State dtype."""

    deter: Tensor | None  # [B, T, D]
    stoch: Tensor | None  # [B, T, L]; None also for modes
    stats: Tensor | None  # [B, T, M]


class ScanGrads(NamedTuple):
    """What the way back leaves; contiguous."""

    x: Tensor  # [B, T, H] weights' dtype: of phase 1's preactivation
    parts: Tensor  # [B, T, 3D] weights' dtype
    y: Tensor  # [B, T, H] weights' dtype: of phase 4's preactivation
    stats: Tensor  # [B, T, M] weights' dtype
    deter: Tensor  # [B, D] state dtype: of the initial state
    norm_weight: Tensor  # [3D] state dtype
    norm_bias: Tensor  # [3D] state dtype


class Before(NamedTuple):
    """What every step started from: ``start`` or the step before; zeros where a sequence begins."""

    start: Tensor  # [B, W] or [B, S, C]
    steps: Tensor  # [B, T, W]
    is_first: Tensor  # [B, T]
    one_hot: bool = False  # steps are, in groups of C; start need not be

    def write(self, to: Tensor) -> None:
        """Into ``to [B, T, W]``."""
        to[:, 0] = self.start.flatten(1)
        to[:, 1:] = self.steps[:, :-1]
        to.masked_fill_(self.is_first[..., None], 0)


Seen = Sequence[Tensor | Before]  # what a weight saw, [B, T, W] each, one beside the other; any dtypes


class TorchProducts:
    """The products over all B·T by PyTorch; no gradients."""

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """``a [N, K] @ b [K, W]``, any strides; the result is contiguous."""
        return a @ b

    def dense(self, x: Tensor, weight: Tensor, bias: Tensor, *, elu: bool) -> Tensor:
        """``x [N, K] @ weight [W, K]ᵀ + bias [W]``, or ELU of it."""
        y = F.linear(x, weight, bias)
        return F.elu(y, inplace=True) if elu else y

    def elu_backward(self, grad: Tensor, y: Tensor) -> Tensor:
        """The gradient before ELU from that behind it and ELU's output; ``[N, W]`` of one dtype."""
        return (grad.to(state_dtype(y.dtype)) * elu_grad(y)).to(y.dtype)

    def weight_gradient(self, grad: Tensor, seen: Seen, columns: int) -> tuple[Tensor, Tensor]:
        """``[N, columns]`` and ``[N]`` of a weight and its bias, from the gradient of its layer, ``grad [B, T, N]``.

        Columns beyond those of ``seen`` saw zeros.
        """
        operand, begin = grad.new_empty(*grad.shape[:2], columns), 0
        for part in seen:
            width = (part.steps if isinstance(part, Before) else part).shape[-1]
            to = operand[..., begin : begin + width]
            part.write(to) if isinstance(part, Before) else to.copy_(part)
            begin += width
        operand[..., begin:] = 0
        rows = grad.flatten(0, 1)
        return self.product(rows.T, operand.flatten(0, 1)), rows.sum(0)


class ScanBackend(Protocol):
    """The recurrence, forward and backward. Arguments are checked; nothing may stop the device."""

    def forward(self, weights: ScanWeights, inputs: ScanInputs, start: ScanStart, latent: Latent) -> Trace:
        """Walk forward."""

    def backward(
        self, weights: ScanWeights, start: ScanStart, trace: Trace, grads: TraceGrads, latent: Latent
    ) -> ScanGrads:
        """Walk back."""

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """See :class:`TorchProducts`."""

    def dense(self, x: Tensor, weight: Tensor, bias: Tensor, *, elu: bool) -> Tensor:
        """See :class:`TorchProducts`."""

    def elu_backward(self, grad: Tensor, y: Tensor) -> Tensor:
        """See :class:`TorchProducts`."""

    def weight_gradient(self, grad: Tensor, seen: Seen, columns: int) -> tuple[Tensor, Tensor]:
        """See :class:`TorchProducts`."""

    def sample(self, stats: Tensor, noise: Tensor | None, latent: Latent) -> Tensor:
        """The prior's samples, all steps at once; see :func:`sample_latent`."""

    def sample_backward(
        self, grad: Tensor, stats: Tensor, noise: Tensor | None, latent: Latent, sampled: bool
    ) -> Tensor | None:
        """See :func:`sample_latent_backward`."""


def scan_weights(params: RSSMParams, latent: Latent) -> ScanWeights:
    """Views of the weights that the recurrence reads."""
    width, deter = latent.stoch * (latent.discrete or 1), params.img_out_weight.shape[1]
    return ScanWeights(
        params.img_in_weight[:, :width],
        *(params.gru_weight, params.gru_bias, params.gru_norm_weight, params.gru_norm_bias),
        params.obs_out_weight[:, :deter],
        *(params.obs_dist_weight, params.obs_dist_bias),
    )


def empty_trace(weights: ScanWeights, start: ScanStart, latent: Latent) -> Trace:
    """For what the recurrence leaves."""
    (batch, length), deter, hidden = start.keep.shape, start.deter.shape[1], weights.obs.shape[0]
    wide, narrow = start.deter.new_empty, weights.gru.new_empty
    return Trace(
        wide(batch, length, deter),
        wide(batch, length, latent.stoch * (latent.discrete or 1)),
        wide(batch, length, weights.dist_bias.shape[0]),
        narrow(batch, length, hidden),
        wide(batch, length, 3 * deter),
        wide(batch, length, 2),
        narrow(batch, length, hidden),
    )


def sample_latent(stats: Tensor, noise: Tensor | None, latent: Latent) -> Tensor:
    """The sample ``[..., L]``, or the mode without noise, of ``stats [..., M]``; noise as in :class:`ScanStart`."""
    noise = whole_noise(noise, tuple(stats.shape[:-1]), latent, stats.dtype)
    if latent.discrete:
        logit = stats.unflatten(-1, (latent.stoch, latent.discrete))
        chosen = (logit if noise is None else logit + noise).argmax(-1)
        return F.one_hot(chosen, latent.discrete).to(stats.dtype).flatten(-2)
    mean, raw = stats.chunk(2, -1)
    return mean.clone() if noise is None else mean + (2 * torch.sigmoid(raw / 2) + latent.min_std) * noise


def sample_latent_backward(
    grad: Tensor, stats: Tensor, noise: Tensor | None, latent: Latent, sampled: bool
) -> Tensor | None:
    """The gradient of ``stats`` from that of the sample, ``[..., L]``; None: modes of one-hots have none."""
    noise = whole_noise(noise, tuple(stats.shape[:-1]), latent, stats.dtype)
    if latent.discrete:
        if not sampled:
            return None
        probs = stats.unflatten(-1, (latent.stoch, latent.discrete)).softmax(-1)
        grad = grad.view_as(probs)
        return (probs * (grad - (probs * grad).sum(-1, keepdim=True))).flatten(-2)
    if noise is None:
        return torch.cat([grad, torch.zeros_like(grad)], -1)
    s = torch.sigmoid(stats.chunk(2, -1)[1] / 2)
    return torch.cat([grad, grad * noise * s * (1 - s)], -1)


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two gradients, of which None is zero."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def elu_grad(y: Tensor) -> Tensor:
    """ELU's derivative from its output, in the states' dtype."""
    return torch.where(y > 0, 1, y.to(state_dtype(y.dtype)) + 1)

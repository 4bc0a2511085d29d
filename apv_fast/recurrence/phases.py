"""The recurrence of the posterior scan, cut free of all that can be done before or after it.

One step of the forward core, in five phases with a barrier after each (rows b of the batch, time t)::

    1  x_t     = elu(inputs.x_t + keep_t·W_stoch z_{t-1})        one-hot z: a sum of S rows; at t = 0 it is hoisted
    2  parts_t = W_gru [x_t, keep_t·h_{t-1}] + b_gru              and each tile's (mean, M2) for the LayerNorm
    3  h_t     = gates(LayerNorm(parts_t), keep_t·h_{t-1})
    4  y_t     = elu(inputs.obs_t + W_obs h_t)
    5  stats_t = W_dist y_t + b_dist;  z_t = sample(stats_t)

The backward core walks back with two carries, dh and the gradient dx_{t+1} of phase 1's preactivation, in four phases::

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
from apv_fast.reference.rssm import LAYER_NORM_EPS, UPDATE_BIAS
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
    """What the forward core leaves: outputs, and what the backward core reads; contiguous."""

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
    """What the backward core leaves; contiguous."""

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


class Core(Protocol):
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


class PlainCore(TorchProducts):
    """The recurrence step by step in plain PyTorch: what the fast cores are compared with, phase by phase."""

    sample = staticmethod(sample_latent)
    sample_backward = staticmethod(sample_latent_backward)

    def forward(self, weights: ScanWeights, inputs: ScanInputs, start: ScanStart, latent: Latent) -> Trace:
        """See :class:`Core`."""
        dtype, (batch, length, _) = inputs.x.dtype, inputs.x.shape
        wide = start.deter.dtype
        noise = whole_noise(start.noise, (batch, length), latent, wide)
        steps: list[tuple[Tensor, ...]] = []
        deter, stoch = start.deter, None
        for t in range(length):
            keep = start.keep[:, t, None]
            before = torch.where(keep, deter, 0)
            x = inputs.x[:, t].to(wide)
            if stoch is not None:
                x = x + torch.where(keep, (stoch.to(dtype) @ weights.stoch.T).to(wide), 0)
            x = F.elu(x).to(dtype)
            parts = F.linear(torch.cat([x, before.to(dtype)], -1), weights.gru, weights.gru_bias).to(wide)
            mean, rstd = (
                parts.mean(-1, keepdim=True),
                (parts.var(-1, correction=0, keepdim=True) + LAYER_NORM_EPS) ** -0.5,
            )
            reset, candidate, update = self._gates(weights, parts, mean, rstd)
            deter = update * torch.tanh(reset * candidate) + (1 - update) * before
            y = F.elu(inputs.obs[:, t].to(wide) + (deter.to(dtype) @ weights.obs.T).to(wide)).to(dtype)
            stats = F.linear(y, weights.dist, weights.dist_bias).to(wide)
            stoch = sample_latent(stats, None if noise is None else noise[:, t], latent)
            steps.append((deter, stoch, stats, x, parts, torch.cat([mean, rstd], -1), y))
        return Trace(*(torch.stack(rows, 1) for rows in zip(*steps, strict=True)))

    @staticmethod
    def _gates(weights: ScanWeights, parts: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reset, candidate before tanh and reset, update; ``[B, D]`` each."""
        scale, offset = weights.norm_weight.to(parts.dtype), weights.norm_bias.to(parts.dtype)
        reset, candidate, update = ((parts - mean) * rstd * scale + offset).chunk(3, -1)
        return torch.sigmoid(reset), candidate, torch.sigmoid(update + UPDATE_BIAS)

    def backward(
        self, weights: ScanWeights, start: ScanStart, trace: Trace, grads: TraceGrads, latent: Latent
    ) -> ScanGrads:
        """See :class:`Core`."""
        dtype, wide, (batch, length, hidden) = trace.x.dtype, start.deter.dtype, trace.x.shape
        noise = whole_noise(start.noise, (batch, length), latent, wide)
        scale = weights.norm_weight.to(wide)
        carry, dx_next = torch.zeros_like(start.deter), None
        norm_weight, norm_bias = torch.zeros_like(scale), torch.zeros_like(scale)
        steps: list[tuple[Tensor, ...]] = []
        for t in reversed(range(length)):
            keep = start.keep[:, t, None]
            # 1
            dz = torch.zeros_like(trace.stoch[:, t]) if grads.stoch is None else grads.stoch[:, t]
            if dx_next is not None:
                dz = dz + torch.where(start.keep[:, t + 1, None], (dx_next @ weights.stoch).to(wide), 0)
            through = sample_latent_backward(
                dz, trace.stats[:, t], None if noise is None else noise[:, t], latent, start.noise is not None
            )
            dstats = torch.zeros_like(trace.stats[:, t]) if grads.stats is None else grads.stats[:, t]
            dstats = (dstats if through is None else dstats + through).to(dtype)
            # 2
            dy = ((dstats @ weights.dist).to(wide) * elu_grad(trace.y[:, t])).to(dtype)
            # 3
            dh = carry + (dy @ weights.obs).to(wide)
            dh = dh if grads.deter is None else dh + grads.deter[:, t]
            mean, rstd = trace.norm[:, t].chunk(2, -1)
            reset, candidate, update = self._gates(weights, trace.parts[:, t], mean, rstd)
            before = torch.where(keep, start.deter if t == 0 else trace.deter[:, t - 1], 0)
            c = torch.tanh(reset * candidate)
            dc = dh * update * (1 - c * c)
            dupdate = dh * (c - before) * update * (1 - update)
            dnorm = torch.cat([dc * candidate * reset * (1 - reset), dc * reset, dupdate], -1)
            xhat = (trace.parts[:, t] - mean) * rstd
            norm_weight, norm_bias = norm_weight + (dnorm * xhat).sum(0), norm_bias + dnorm.sum(0)
            # 4
            dxhat = dnorm * scale
            means = dxhat.mean(-1, keepdim=True), (dxhat * xhat).mean(-1, keepdim=True)
            dparts = (rstd * (dxhat - means[0] - xhat * means[1])).to(dtype)
            both = (dparts @ weights.gru).to(wide)
            dx_next = (both[:, :hidden] * elu_grad(trace.x[:, t])).to(dtype)
            carry = torch.where(keep, both[:, hidden:] + (1 - update) * dh, 0)
            steps.append((dx_next, dparts, dy, dstats))
        dx, dparts, dy, dstats = (torch.stack(rows[::-1], 1) for rows in zip(*steps, strict=True))
        return ScanGrads(dx, dparts, dy, dstats, carry, norm_weight, norm_bias)

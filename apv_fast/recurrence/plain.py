"""The recurrence step by step in plain PyTorch: what the fast ones are compared with, phase by phase."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apv_fast.recurrence.phases import (
    ScanGrads,
    ScanInputs,
    ScanStart,
    ScanWeights,
    TorchProducts,
    Trace,
    TraceGrads,
    elu_grad,
    sample_latent,
    sample_latent_backward,
)
from apv_fast.reference.noise import whole_noise
from apv_fast.reference.rssm_step import LAYER_NORM_EPS, UPDATE_BIAS
from apv_fast.types import Latent


class PlainScan(TorchProducts):
    """See :class:`apv_fast.recurrence.phases.ScanBackend`."""

    sample = staticmethod(sample_latent)
    sample_backward = staticmethod(sample_latent_backward)

    def forward(self, weights: ScanWeights, inputs: ScanInputs, start: ScanStart, latent: Latent) -> Trace:
        """See :class:`ScanBackend`."""
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
        """See :class:`ScanBackend`."""
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

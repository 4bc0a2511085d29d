r"""Imagination in Triton: T steps of the prior, and the walk back, as large products with fused epilogues.

A step is five launches (:mod:`apv_fast.kernels.parts.dense`, :mod:`apv_fast.kernels.parts.gates`)::

    x = elu([z, a] W_inᵀ + b)  │  parts = [x, h] W_gruᵀ + b  │  h = gates(LayerNorm(parts), h)
    y = elu(h W_outᵀ + b)      │  stats = y W_distᵀ + b, z = sample(stats)

and so is a step back, with one carry, ∂h, and ∂x for the step before::

    ∂stats = ∂stats' + sample'(∂z' + ∂x⁺ W_stoch)  │  ∂y = (∂stats W_dist) ∘ elu'(y)  │  ∂y W_out
    ∂parts = gates'  │  [∂x, ∂h] = ∂parts W_gru (∂x ∘ elu'(x), ∂h + (1 - G)·∂h⁺)

The actions' gradient is one product ∂x W_action over all steps afterwards; so are the weights' gradients, where they
are asked for. Gaussian latents, and variables wider than a tile, take one launch more to sample.

What is kept for the way back, a row and step at full size in bfloat16: parts 6 KB, x and y 2 KB each, norm 8 B: 10 KB
beside the outputs' 12 KB; with the actor 26 KB in all. Gates, softmax and the operands of products are made again, at
the cost of no product. PyTorch's autograd holds 82 KB. Without gradients nothing is kept.

Floor of a step for 2500 rows at full size: 47 GFLOP, 79 µs at 600 TFLOP/s, forward and back alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apv_fast.types import Latent, state_dtype

from .dense import dense, dense_sample, dense_softmax, fits, gru_backward
from .gates import gates, gates_backward, norm_weight_grads
from .latent import noise_of_step, sample_backward_into, sample_into


class Weights(NamedTuple):
    """The first ten of ``RSSMParams``: what a step without looking reads."""

    img_in_weight: Tensor
    img_in_bias: Tensor
    gru_weight: Tensor
    gru_bias: Tensor
    gru_norm_weight: Tensor
    gru_norm_bias: Tensor
    img_out_weight: Tensor
    img_out_bias: Tensor
    img_dist_weight: Tensor
    img_dist_bias: Tensor

    @classmethod
    def of(cls, tensors: list[Tensor]) -> Weights:
        """From the op's list; biases and scales contiguous, as the kernels read them."""
        return cls(*(x if x.dim() > 1 else x.contiguous() for x in tensors))

    def columns(self, width: int, actions: int) -> tuple[Tensor, Tensor]:
        """img_in's columns that see stoch, ``[H, width]``, and the action, ``[H, actions]``.

        Copies: in the weights themselves rows begin anywhere, as the padding has it, and loads would be short.
        """
        stoch, action = self.img_in_weight[:, :width], self.img_in_weight[:, width : width + actions]
        return stoch.contiguous(), action.contiguous()

    @property
    def deter(self) -> int:
        """D."""
        return self.gru_weight.shape[0] // 3

    @property
    def hidden(self) -> int:
        """H."""
        return self.img_in_weight.shape[0]


class Steps(NamedTuple):
    """Where the steps of a call lie in memory. Tensors of the steps are ``[T, N, W]`` in either case."""

    length: int  # T
    rows: int  # N
    batch_first: bool  # in memory [N, T, W]

    def empty(self, like: Tensor, width: int, dtype: torch.dtype, *, keep: bool = True) -> Tensor:
        """``[T, N, width]``, or room for one step that every step overwrites."""
        if not keep:
            return like.new_empty(1, self.rows, width, dtype=dtype).expand(self.length, -1, -1)
        if self.batch_first:
            return like.new_empty(self.rows, self.length, width, dtype=dtype).transpose(0, 1)
        return like.new_empty(self.length, self.rows, width, dtype=dtype)

    def outside(self, x: Tensor) -> Tensor:
        """As it lies in memory: ``[N, T, W]`` if batch-first."""
        return x.transpose(0, 1) if self.batch_first else x

    def flat(self, x: Tensor) -> Tensor:
        """All steps' rows, ``[T·N, W]``, in the order of the memory."""
        return self.outside(x).reshape(-1, x.shape[-1])

    def noise_strides(self, width: int) -> tuple[int, int]:
        """(from step to step, from row to row) in a noise tensor that lies like the steps."""
        return (width, self.length * width) if self.batch_first else (self.rows * width, width)


class Trace(NamedTuple):
    """What a roll-out leaves, ``[T, N, ...]``."""

    deter: Tensor  # D, the states' dtype
    stoch: Tensor  # L, the states' dtype
    stats: Tensor  # M, the states' dtype: logits, or mean and the preactivation of std
    x: Tensor  # H, the weights' dtype: before its activation
    parts: Tensor  # 3D, the weights' dtype
    norm: Tensor  # 2, the states' dtype
    y: Tensor  # H, the weights' dtype: before its activation


ACTION_PAD = 64  # what actions are padded to, so that no product has a remainder that is read number by number


class Start(NamedTuple):
    """The states that a roll-out starts from."""

    deter: Tensor  # [N, D], the states' dtype
    stoch: Tensor  # [N, L]

    @classmethod
    def of(cls, deter: Tensor, stoch: Tensor) -> Start:
        """Contiguous, the latents flattened."""
        return cls(deter.contiguous(), stoch.flatten(1).contiguous())


class Operands:
    """One step's operands of all products in one row of memory, in the weights' dtype: ``[x | h | z | a | zeros]``.

    So a concatenation is a piece of a row, every product has a single operand, and what a step makes goes where the
    next reads it. Every step overwrites the row, each piece after its last reading.
    """

    def __init__(self, weights: Weights, start: Start, actions: int) -> None:
        hidden, deter, width = weights.hidden, weights.deter, start.stoch.shape[1]
        pad = -actions % ACTION_PAD
        row = weights.gru_weight.new_zeros(len(start.deter), hidden + deter + width + actions + pad)
        self.x, self.deter, self.stoch, self.action, _ = row.split([hidden, deter, width, actions, pad], 1)
        self.of_gru = row[:, : hidden + deter]
        self.of_actor = row[:, hidden : hidden + deter + width]  # deter first
        self.of_img_in = row[:, hidden + deter :]
        self.img_in = F.pad(torch.cat(weights.columns(width, actions), 1), (0, pad))  # [H, L + A + zeros]
        self.deter.copy_(start.deter)
        self.stoch.copy_(start.stoch)


Act = Callable[[int, Operands], None]  # fills the operands' action for step t


def roll_out(
    weights: Weights,
    start: Start,
    act: Act,
    actions: int,
    steps: Steps,
    latent: Latent,
    noise: Tensor | None,
    keep: bool,
) -> Trace:
    """T steps from ``start``, the actions (A = ``actions``) from ``act``; ``keep`` what the way back needs."""
    dtype, wide = weights.gru_weight.dtype, start.deter.dtype
    width, statistics = start.stoch.shape[1], len(weights.img_dist_bias)
    trace = Trace(
        steps.empty(start.deter, weights.deter, wide),
        steps.empty(start.deter, width, wide),
        steps.empty(start.deter, statistics, wide),
        steps.empty(start.deter, weights.hidden, dtype, keep=keep),
        steps.empty(start.deter, 3 * weights.deter, dtype, keep=keep),
        steps.empty(start.deter, 2, wide, keep=keep),
        steps.empty(start.deter, weights.hidden, dtype, keep=keep),
    )
    room, before = Operands(weights, start, actions), start.deter
    hidden = room.x.new_empty(steps.rows, weights.hidden)
    noise = None if noise is None else noise.contiguous()
    for t in range(steps.length):
        row = Trace(*(x[t] for x in trace))
        act(t, room)
        dense(room.x, room.of_img_in, room.img_in, weights.img_in_bias, elu=True, keep=row.x if keep else None)
        dense(row.parts, room.of_gru, weights.gru_weight, weights.gru_bias)
        scale, offset = weights.gru_norm_weight, weights.gru_norm_bias
        gates(row.parts, scale, offset, before, row.deter, room.deter, row.norm)
        before = row.deter
        y = row.y if keep else None
        dense(hidden, room.deter, weights.img_out_weight, weights.img_out_bias, elu=True, keep=y)
        at = noise_of_step(noise, t, *steps.noise_strides(width))
        if fits(latent, steps.rows, hidden):
            head = (hidden, weights.img_dist_weight, weights.img_dist_bias)
            dense_sample(*head, at, latent, row.stats, row.stoch, room.stoch)
        else:
            dense(row.stats, hidden, weights.img_dist_weight, weights.img_dist_bias)
            sample_into(row.stats, at, latent, row.stoch, room.stoch)
    return trace


class OutputGrads(NamedTuple):
    """Gradients of a roll-out's outputs, ``[T, N, ...]``; None: zeros."""

    deter: Tensor | None
    stoch: Tensor | None
    stats: Tensor | None

    @classmethod
    def of(cls, grads: list[Tensor | None], steps: Steps) -> OutputGrads:
        """As the kernels read them: steps first, rows contiguous."""
        return cls(*(None if g is None else steps.outside(g if g.stride(-1) == 1 else g.contiguous()) for g in grads))


class StepGrads(NamedTuple):
    """Gradients of preactivations, ``[T, N, ...]`` in the weights' dtype, and of the start's deter."""

    x: Tensor  # H
    parts: Tensor  # 3D; of the first step alone unless the weights' gradients are wanted, and so below
    y: Tensor  # H
    stats: Tensor  # M
    deter: Tensor  # [N, D]
    norm_weight: Tensor  # [3D], zeros unless the weights' gradients are wanted
    norm_bias: Tensor


def packed(w: Tensor) -> Tensor:
    """``w`` laid out for products with its transpose: in tf32, Hopper's tensor cores read along the sum only."""
    return w.t().contiguous().t() if w.dtype == torch.float32 and w.is_cuda else w


def walk_back(
    weights: Weights,
    start: Start,
    trace: Trace,
    grads: OutputGrads,
    steps: Steps,
    latent: Latent,
    noise: Tensor | None,
    of_weights: bool,
) -> StepGrads:
    """The reverse scan; with ``of_weights`` it keeps what the weights' gradients need."""
    dtype, like = weights.gru_weight.dtype, start.deter
    width = start.stoch.shape[1]
    through = noise is not None or not latent.discrete  # the mode of a one-hot has no gradient
    grads = grads if through else grads._replace(stoch=None)
    dx = steps.empty(like, weights.hidden, dtype)
    dparts = steps.empty(like, 3 * weights.deter, dtype, keep=of_weights)
    dy = steps.empty(like, weights.hidden, dtype, keep=of_weights)
    dstats = steps.empty(like, trace.stats.shape[-1], dtype, keep=of_weights)
    dh, carry = torch.empty_like(like), torch.zeros_like(like)
    dz = like.new_empty(like.shape[0], width) if through and not fits(latent, steps.rows, dx) else None
    dnorm = like.new_empty(len(like), 3 * weights.deter) if of_weights else None
    norm = [like.new_zeros(3 * weights.deter) for _ in range(2)]
    of_stoch = packed(weights.columns(width, 0)[0]).t()
    of_dist, of_out, gru = (
        packed(weights.img_dist_weight).t(),
        packed(weights.img_out_weight).t(),
        packed(weights.gru_weight),
    )
    noise = None if noise is None else noise.contiguous()
    for t in reversed(range(steps.length)):
        of_z, own = (None if g is None else g[t] for g in (grads.stoch, grads.stats))
        at, stats = noise_of_step(noise, t, *steps.noise_strides(width)), trace.stats[t]
        if through and t + 1 < steps.length and dz is None:
            dense_softmax(dx[t + 1], of_stoch, of_z, own, stats, latent, dstats[t])
        elif through and t + 1 < steps.length and dz is not None:
            dense(dz, dx[t + 1], of_stoch)
            sample_backward_into(dz if of_z is None else dz.add_(of_z), own, stats, at, latent, dstats[t])
        elif of_z is not None:
            sample_backward_into(of_z, own, stats, at, latent, dstats[t])
        elif own is not None:
            dstats[t].copy_(own)
        else:
            dstats[t].zero_()
        dense(dy[t], dstats[t], of_dist, gate=trace.y[t])
        dense(dh, dy[t], of_out)
        before = trace.deter[t - 1] if t else start.deter
        own = None if grads.deter is None else grads.deter[t]
        scale, offset = weights.gru_norm_weight, weights.gru_norm_bias
        gates_backward(dh, own, carry, trace.parts[t], trace.norm[t], scale, offset, before, dparts[t], dnorm)
        if dnorm is not None:
            of_norm = norm_weight_grads(dnorm, trace.parts[t], trace.norm[t])
            norm = [total + one for total, one in zip(norm, of_norm, strict=True)]
        gru_backward(dparts[t], gru, trace.x[t], dx[t], carry)
    return StepGrads(dx, dparts, dy, dstats, carry, *norm)


def states_before(start: Tensor, states: Tensor, dtype: torch.dtype) -> Tensor:
    """What every step started from, ``[T, N, W]`` in ``dtype``."""
    return torch.cat([start[None].to(dtype), states[:-1].to(dtype)])


def weight_grads(
    weights: Weights, start: Start, trace: Trace, action: Tensor | None, grads: StepGrads, steps: Steps
) -> list[Tensor]:
    """Gradients of the ten weights: one product each over all steps; ``action [T, N, A]``."""
    dtype = weights.gru_weight.dtype
    deter, stoch = (states_before(*pair, dtype) for pair in zip(start, trace[:2], strict=True))
    dx, dparts, dy, dstats, x, y, stoch, deter, after = (
        steps.flat(each) for each in (*grads[:4], F.elu(trace.x), F.elu(trace.y), stoch, deter, trace.deter)
    )
    seen = stoch if action is None else torch.cat([stoch, steps.flat(action).to(dtype)], -1)
    pad = weights.img_in_weight.shape[1] - seen.shape[1]
    return [
        *(F.pad(dx.T @ seen, (0, pad)), dx.sum(0)),
        *(torch.cat([dparts.T @ x, dparts.T @ deter], 1), dparts.sum(0)),
        *(grads.norm_weight.to(dtype), grads.norm_bias.to(dtype)),
        *(dy.T @ after.to(dtype), dy.sum(0)),
        *(dstats.T @ y, dstats.sum(0)),
    ]


def start_stoch_grad(weights: Weights, dx: Tensor, width: int) -> Tensor:
    """Gradient ``[N, width]`` of the latents that a step started from, from that of its x."""
    out = dx.new_empty(len(dx), width, dtype=state_dtype(dx.dtype))
    dense(out, dx, packed(weights.columns(width, 0)[0]).t())
    return out


def action_grad(weights: Weights, dx: Tensor, width: int, actions: int, steps: Steps) -> Tensor:
    """Gradient ``[T, N, A]`` of the actions of all steps, one product."""
    out = steps.empty(dx, actions, state_dtype(dx.dtype))
    dense(steps.flat(out), steps.flat(dx), packed(weights.columns(width, actions)[1]).t())
    return out

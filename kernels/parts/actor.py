r"""The actor inside a roll-out: six launches a step forward, and its whole backward as products over all steps.

The actor is fed features that gradients do not pass, so it is not part of the recurrence that the way back walks: once
the gradient of every action is there, with R = H·N rows of all steps together::

    ∂head = sample'(∂action);   ∂u_L = (∂head W_head) ∘ elu';   ∂u_l = (∂u_{l+1} W_{l+1}) ∘ elu'
    ∂W_l  = ∂u_lᵀ u_{l-1},  the first layer's with [z, h] before each step

Kept a row and step: the hidden layers before their activations (400 numbers each) and the heads. Weight gradients are
plain large products and go to cuBLAS.
"""
# mypy: allow-untyped-decorators

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apv_fast.types import ActorParams, Latent

from . import truncated_normal
from .dense import dense
from .imagine import Operands, Start, Steps, packed, states_before
from .latent import noise_of_step, sample_backward_into, sample_into


class ActorTrace(NamedTuple):
    """What the actor leaves, ``[T, N, ...]``."""

    action: Tensor  # A, the states' dtype
    head: Tensor  # A or 2A, the states' dtype
    hidden: list[Tensor]  # U of each layer, the weights' dtype: before the activation


class Actor:
    """One actor during one call: its weights as the kernels read them, and its noise."""

    def __init__(
        self, params: ActorParams, width: int, steps: Steps, deter: int, min_std: float, noise: Tensor
    ) -> None:
        self.steps, self.min_std = steps, min_std
        self.discrete, self.actions = params.discrete, len(params.out_bias)
        self.weights, self.biases = list(params.trunk[::2]), [bias.contiguous() for bias in params.trunk[1::2]]
        if params.std_weight is None or params.std_bias is None:
            self.head, self.head_bias = params.out_weight, params.out_bias.contiguous()
        else:  # one product for both heads
            self.head = torch.cat([params.out_weight, params.std_weight])
            self.head_bias = torch.cat([params.out_bias, params.std_bias])
        columns = self.weights[0].split([width, deter], 1)
        self.first = torch.cat(columns[::-1], 1)  # as the operands lie: deter, then stoch
        self.noise = noise.contiguous()

    def room(self, like: Tensor, keep: bool) -> ActorTrace:
        """An empty trace; ``like`` is a state."""
        wide, dtype = like.dtype, self.head.dtype
        return ActorTrace(
            self.steps.empty(like, self.actions, wide),
            self.steps.empty(like, len(self.head), wide, keep=keep),
            [self.steps.empty(like, len(bias), dtype, keep=keep) for bias in self.biases],
        )

    def act(self, t: int, room: Operands, trace: ActorTrace, keep: bool) -> None:
        """The action of step t for the features before it, into the room and the trace."""
        x, w = room.of_actor, self.first
        for i, bias in enumerate(self.biases):
            hidden = x.new_empty(len(x), len(bias))
            dense(hidden, x, w, bias, elu=True, keep=trace.hidden[i][t] if keep else None)
            x, w = hidden, self.weights[i + 1] if i + 1 < len(self.weights) else self.head
        head, action = trace.head[t], trace.action[t]
        dense(head, x, w, self.head_bias)
        noise = noise_of_step(self.noise, t, *self.steps.noise_strides(self.actions))
        if self.discrete:
            sample_into(head, noise, Latent(1, self.actions), action, room.action)
        else:
            truncated_normal.sample(head, noise, self.min_std, action, room.action)

    def backward(self, grad: Tensor, trace: ActorTrace, start: Start, deter: Tensor, stoch: Tensor) -> list[Tensor]:
        """Gradients of the tensors of :meth:`ActorParams.flat` from that of the actions, ``[T, N, A]``.

        ``deter`` and ``stoch`` are the states after each step.
        """
        flat, dtype = self.steps.flat, self.head.dtype
        grad, head = flat(grad), flat(trace.head)
        d_out = torch.empty_like(head, dtype=dtype)
        noise = noise_of_step(self.noise, 0, 0, self.actions)
        if self.discrete:
            sample_backward_into(grad, None, head, noise, Latent(1, self.actions), d_out)
        else:
            truncated_normal.sample_backward(grad, head, noise, self.min_std, d_out)
        grad_params: list[Tensor] = []
        after = self.head
        for i in reversed(range(len(self.weights))):
            hidden = flat(trace.hidden[i])
            grad_params = [d_out.T @ F.elu(hidden), d_out.sum(0), *grad_params]
            below = torch.empty_like(hidden)
            dense(below, d_out, packed(after).t(), gate=hidden)
            d_out, after = below, self.weights[i]
        pairs = zip(start[::-1], (stoch, deter), strict=True)
        features = [states_before(*pair, dtype) for pair in pairs]
        grad_params = [torch.cat([d_out.T @ flat(x) for x in features], 1), d_out.sum(0), *grad_params]
        *trunk, weight, bias = grad_params
        if self.discrete:
            return grad_params
        return [*trunk, *(part for half in range(2) for part in self._half(weight, bias, half))]

    def _half(self, weight: Tensor, bias: Tensor, half: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of one of the two heads, in memory of their own."""
        rows = slice(half * self.actions, (half + 1) * self.actions)
        return weight[rows].clone(), bias[rows].clone()

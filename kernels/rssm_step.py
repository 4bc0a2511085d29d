r"""``rssm_step`` in Triton: one step of the prior, and behind it the posterior's head as an op of its own.

The prior is :mod:`apv_fast.kernels.parts.imagine` at T = 1. The posterior reads its deter::

    y = elu([h, e] W_obs_outᵀ + b)  │  stats = y W_obs_distᵀ + b, z = sample(stats)

and back: ``∂stats = ∂stats' + sample'(∂z')``, ``∂y = (∂stats W_dist) ∘ elu'(y)``, ``[∂h, ∂e] = ∂y W_obs_out``. Starting
again at ``is_first`` is a choice by a mask before either. Acting (N = 1) reads every weight once: 25 MB in bfloat16
at full size with E = 1536, 8 µs of an H100's 3.35 TB/s; the eight launches are the rest.
"""
# mypy: allow-untyped-decorators

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apv_fast.ops.op import Gradients, Kernel
from apv_fast.ops.rssm_step import RssmStep
from apv_fast.recurrence.imagination import as_sequence
from apv_fast.types import Latent, RSSMParams, State, state_of

from .parts.dense import dense, dense_sample, fits
from .parts.imagine import packed
from .parts.latent import sample_backward_into, sample_into, whole
from .rssm_imagine import rssm_imagine

_FIRST = RSSMParams._fields.index("obs_out_weight")  # of the head's four weights


class Posterior(NamedTuple):
    """What the posterior's head is called with."""

    weights: list[Tensor]  # of Head
    deter: Tensor  # [N, D]
    embed: Tensor  # [N, E]
    latent: Latent
    noise: Tensor | None  # [N, S, C] or [N, S], a seed, or None: modes


class Head(NamedTuple):
    """The posterior's weights."""

    out_weight: Tensor  # [H, D + E]
    out_bias: Tensor
    dist_weight: Tensor  # [M, H]
    dist_bias: Tensor

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Head:
        """From the op's list; biases contiguous, as the kernels read them."""
        return cls(*(x if x.dim() > 1 else x.contiguous() for x in tensors))


def _seen(head: Head, deter: Tensor, embed: Tensor) -> Tensor:
    """What obs_out reads, ``[N, D + E]``."""
    return torch.cat([x.to(head.out_weight.dtype) for x in (deter, embed)], 1)


def _forward(call: Posterior, keep: bool) -> list[Tensor]:
    """Flat latents ``[N, L]``, statistics ``[N, M]`` and, with ``keep``, the hidden layer ``[N, H]``, not activated."""
    head, latent, deter = Head.of(call.weights), call.latent, call.deter
    width = latent.stoch * (latent.discrete or 1)
    stoch, stats = (deter.new_empty(len(deter), w) for w in (width, len(head.dist_bias)))
    y, hidden = (head.out_weight.new_empty(len(deter), len(head.out_bias)) for _ in range(2))
    dense(hidden, _seen(head, deter, call.embed), head.out_weight, head.out_bias, elu=True, keep=y)
    if fits(latent, len(y), y):
        dense_sample(hidden, head.dist_weight, head.dist_bias, whole(call.noise, width), latent, stats, stoch, None)
    else:
        dense(stats, hidden, head.dist_weight, head.dist_bias)
        sample_into(stats, whole(call.noise, width), latent, stoch, None)
    return [stoch, stats, y] if keep else [stoch, stats]


def _backward(call: Posterior, results: list[Tensor], grads: list[Tensor | None], needs: frozenset[str]) -> Gradients:
    (_, stats, y), (grad_stoch, grad_stats) = results, grads
    head, latent = Head.of(call.weights), call.latent
    dstats = torch.empty_like(stats, dtype=y.dtype)
    if grad_stoch is None or (latent.discrete and call.noise is None):  # a mode has no gradient
        dstats.zero_() if grad_stats is None else dstats.copy_(grad_stats)
    else:
        own = None if grad_stats is None else grad_stats.contiguous()
        at = whole(call.noise, grad_stoch.shape[1])
        sample_backward_into(grad_stoch.contiguous(), own, stats, at, latent, dstats)
    dy = torch.empty_like(y)
    dense(dy, dstats, packed(head.dist_weight).t(), gate=y)
    inputs = {"deter": call.deter, "embed": call.embed}
    out: Gradients = {k: torch.empty_like(x, memory_format=torch.contiguous_format) for k, x in inputs.items()}
    widths = [call.deter.shape[1], call.embed.shape[1]]
    for grad, w in zip(list(out.values()), head.out_weight.split(widths, 1), strict=True):
        dense(grad, dy, packed(w).t())
    if "weights" in needs:
        seen = _seen(head, call.deter, call.embed)
        out["weights"] = [dy.T @ seen, dy.sum(0), dstats.T @ F.elu(y), dstats.sum(0)]
    return out


def _fake(call: Posterior, keep: bool) -> list[Tensor]:
    deter, weights, latent = call.deter, call.weights, call.latent
    outputs = [
        deter.new_empty(deter.shape[0], latent.stoch * (latent.discrete or 1)),
        deter.new_empty(deter.shape[0], weights[3].shape[0]),
    ]
    return [*outputs, weights[0].new_empty(deter.shape[0], weights[1].shape[0])] if keep else outputs


_posterior = Kernel(
    "posterior_triton",
    Posterior,
    outputs=2,
    forward=_forward,
    backward=_backward,
    fake=_fake,
    constant=lambda call: [0] if call.latent.discrete and call.noise is None else [],
)


def _kept(keep: Tensor, x: Tensor) -> Tensor:
    """Zeros where an episode begins; no product: 0·NaN is NaN, and what came before is forgotten."""
    return torch.where(keep.view(-1, *[1] * (x.dim() - 1)), x, 0)


def rssm_step(*fields: Any) -> tuple[State, State]:
    """One step; arguments and result as :func:`apv_fast.reference.rssm_step.rssm_step`, which see."""
    call = RssmStep(*fields)
    state, action, latent = call.state, call.action, call.latent
    if call.is_first is not None:
        keep = ~call.is_first
        state = {key: _kept(keep, x) for key, x in state.items()}
        action = None if action is None else _kept(keep, action)
    sequence = rssm_imagine(call.params, state, as_sequence(action), 1, latent, as_sequence(call.prior_noise))
    prior = {key: x[:, 0] for key, x in sequence.items()}
    if call.embed is None:
        return prior, prior
    stoch, stats = _posterior(list(call.params[_FIRST:]), prior["deter"], call.embed, latent, call.post_noise)
    return state_of(prior["deter"], stoch, stats, latent), prior

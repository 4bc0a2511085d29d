r"""``rssm_step`` in Triton: one step of the prior, and behind it the posterior's head as an op of its own.

The prior is :mod:`apv_fast.kernels.parts.imagine` at T = 1. The posterior reads its deter::

    y = elu([h, e] W_obs_outᵀ + b)  │  stats = y W_obs_distᵀ + b, z = sample(stats)

and back: ``∂stats = ∂stats' + sample'(∂z')``, ``∂y = (∂stats W_dist) ∘ elu'(y)``, ``[∂h, ∂e] = ∂y W_obs_out``. Starting
again at ``is_first`` is a product with a mask before either. Acting (N = 1) reads every weight once: 25 MB in bfloat16
at full size with E = 1536, 8 µs of an H100's 3.35 TB/s; the eight launches are the rest.
"""
# mypy: allow-untyped-decorators

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apv_fast.types import Latent, RSSMParams, State, state_of

from .parts.dense import dense, dense_sample, fits
from .parts.imagine import packed
from .parts.latent import sample_backward_into, sample_into, whole
from .rssm_imagine import rssm_imagine

_SCHEMA = "Tensor[] weights, Tensor deter, Tensor embed, int S, int C, float min_std, Tensor? noise"
_FIRST = RSSMParams._fields.index("obs_out_weight")  # of the head's four weights


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


@torch.library.custom_op("apv_fast::posterior_triton", mutates_args=(), schema=f"({_SCHEMA}) -> Tensor[]")
def _forward(weights: list[Tensor], *rest: Any) -> list[Tensor]:
    """Flat latents ``[N, L]``, statistics ``[N, M]`` and the hidden layer ``[N, H]`` before its activation."""
    deter, embed, *numbers, noise = rest
    head, latent = Head.of(weights), Latent(*numbers)
    width = latent.stoch * (latent.discrete or 1)
    stoch, stats = (deter.new_empty(len(deter), w) for w in (width, len(head.dist_bias)))
    y, hidden = (head.out_weight.new_empty(len(deter), len(head.out_bias)) for _ in range(2))
    dense(hidden, _seen(head, deter, embed), head.out_weight, head.out_bias, elu=True, keep=y)
    if fits(latent, len(y), y):
        dense_sample(hidden, head.dist_weight, head.dist_bias, whole(noise, width), latent, stats, stoch, None)
    else:
        dense(stats, hidden, head.dist_weight, head.dist_bias)
        sample_into(stats, whole(noise, width), latent, stoch, None)
    return [stoch, stats, y]


@torch.library.custom_op(
    "apv_fast::posterior_triton_backward",
    mutates_args=(),
    schema=f"({_SCHEMA}, Tensor stats, Tensor y, Tensor? grad_stoch, Tensor? grad_stats, bool of_weights) -> Tensor[]",
)
def _backward(weights: list[Tensor], *rest: Any) -> list[Tensor]:
    """Gradients of deter, embed and, if asked for, the weights (else empty)."""
    deter, embed, *numbers, noise, stats, y, grad_stoch, grad_stats, of_weights = rest
    head, latent, dtype = Head.of(weights), Latent(*numbers), y.dtype
    dstats = torch.empty_like(stats, dtype=dtype)
    if grad_stoch is None or (latent.discrete and noise is None):  # a mode has no gradient
        dstats.zero_() if grad_stats is None else dstats.copy_(grad_stats)
    else:
        own = None if grad_stats is None else grad_stats.contiguous()
        at = whole(noise, grad_stoch.shape[1])
        sample_backward_into(grad_stoch.contiguous(), own, stats, at, latent, dstats)
    dy = torch.empty_like(y)
    dense(dy, dstats, packed(head.dist_weight).t(), gate=y)
    made = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (deter, embed)]
    for out, w in zip(made, head.out_weight.split([deter.shape[1], embed.shape[1]], 1), strict=True):
        dense(out, dy, packed(w).t())
    if not of_weights:
        return made + [deter.new_empty(0) for _ in weights]
    return [*made, dy.T @ _seen(head, deter, embed), dy.sum(0), dstats.T @ F.elu(y), dstats.sum(0)]


@_forward.register_fake
def _(weights: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    deter, _, S, C, *_ = rest
    n = len(deter)
    return [
        deter.new_empty(n, S * (C or 1)),
        deter.new_empty(n, weights[3].shape[0]),
        weights[0].new_empty(n, weights[1].shape[0]),
    ]


@_backward.register_fake
def _(weights: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    deter, embed, *_, of_weights = rest
    made = [x.new_empty(x.shape) for x in (deter, embed)]
    return made + [w.new_empty(w.shape) if of_weights else deter.new_empty(0) for w in weights]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    weights, deter, embed, *numbers, noise = inputs
    ctx.set_materialize_grads(False)
    ctx.numbers, ctx.count = numbers, len(weights)
    stoch, stats, y = output
    if numbers[1] and noise is None:
        ctx.mark_non_differentiable(stoch, y)
    else:
        ctx.mark_non_differentiable(y)
    ctx.save_for_backward(*weights, deter, embed, noise, stats, y)


def _differentiate(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    *weights, deter, embed, noise, stats, y = ctx.saved_tensors
    of_weights = any(ctx.needs_input_grad[0])
    d_deter, d_embed, *d_weights = _backward(
        list(weights), deter, embed, *ctx.numbers, noise, stats, y, grads[0], grads[1], of_weights
    )
    given = d_weights if of_weights else [None] * len(weights)
    return given, d_deter, d_embed, *(None for _ in (*ctx.numbers, "noise"))


_forward.register_autograd(_differentiate, setup_context=_save)


def _where(keep: Tensor, x: Tensor) -> Tensor:
    return x * keep.view(-1, *[1] * (x.dim() - 1))


def _first(x: Tensor | None) -> Tensor | None:
    """A sequence of one step; a seed stays one."""
    return x if x is None or x.dim() == 0 else x[:, None]


def rssm_step(
    params: RSSMParams,
    state: State,
    action: Tensor | None,
    embed: Tensor | None,
    is_first: Tensor | None,
    latent: Latent,
    post_noise: Tensor | None,
    prior_noise: Tensor | None,
) -> tuple[State, State]:
    """One step; arguments and result as :func:`apv_fast.reference.rssm.rssm_step`, which see."""
    if is_first is not None:
        keep = ~is_first
        state = {key: _where(keep, x) for key, x in state.items()}
        action = None if action is None else _where(keep, action)
    sequence = rssm_imagine(params, state, _first(action), 1, latent, _first(prior_noise))
    prior = {key: x[:, 0] for key, x in sequence.items()}
    if embed is None:
        return prior, prior
    stoch, stats, _ = _forward(list(params[_FIRST:]), prior["deter"], embed, *latent, post_noise)
    return state_of(prior["deter"], stoch, stats, latent), prior

"""KL divergence between posterior and prior with balancing and free nats (Hafner et al. 2021, algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Statistics = tuple[Tensor, ...]


def kl_categorical(p: Statistics, q: Statistics) -> Tensor:
    """KL(p ‖ q) of one-hot categoricals given by logits ``[..., S, C]``, summed over S; ``[...]``."""
    log_p, log_q = p[0].log_softmax(-1), q[0].log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum((-2, -1))


def kl_normal(p: Statistics, q: Statistics) -> Tensor:
    """KL(p ‖ q) of diagonal normals given by mean and std ``[..., S]``, summed over S; ``[...]``."""
    (p_mean, p_std), (q_mean, q_std) = p, q
    ratio = p_std / q_std
    return (0.5 * (ratio.square() + ((p_mean - q_mean) / q_std).square() - 1) - ratio.log()).sum(-1)


def _balance(
    divergence: Callable[[Statistics, Statistics], Tensor],
    post: Statistics,
    prior: Statistics,
    balance: float,
    free: float,
    free_avg: bool,
    forward: bool,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(post[0].dtype, torch.float32)
    post, prior = tuple(x.to(dtype) for x in post), tuple(x.to(dtype) for x in prior)
    lhs, rhs = (prior, post) if forward else (post, prior)
    mix = balance if forward else 1 - balance
    if balance == 0.5:
        value = divergence(lhs, rhs)
        return value.clamp(min=free).mean(), value.detach()
    value_lhs = divergence(lhs, tuple(x.detach() for x in rhs))
    value_rhs = divergence(tuple(x.detach() for x in lhs), rhs)
    if free_avg:
        loss_lhs, loss_rhs = value_lhs.mean().clamp(min=free), value_rhs.mean().clamp(min=free)
    else:
        loss_lhs, loss_rhs = value_lhs.clamp(min=free).mean(), value_rhs.clamp(min=free).mean()
    return mix * loss_lhs + (1 - mix) * loss_rhs, value_lhs.detach()


def kl_balance(
    post_logit: Tensor, prior_logit: Tensor, balance: float, free: float, free_avg: bool, forward: bool
) -> tuple[Tensor, Tensor]:
    """The loss (scalar) and, for logging, the divergence ``[B, T]`` of categorical latents ``[B, T, S, C]``."""
    return _balance(kl_categorical, (post_logit,), (prior_logit,), balance, free, free_avg, forward)


def kl_balance_normal(
    post_mean: Tensor,
    post_std: Tensor,
    prior_mean: Tensor,
    prior_std: Tensor,
    balance: float,
    free: float,
    free_avg: bool,
    forward: bool,
) -> tuple[Tensor, Tensor]:
    """The same for Gaussian latents ``[B, T, S]``."""
    return _balance(kl_normal, (post_mean, post_std), (prior_mean, prior_std), balance, free, free_avg, forward)

"""KL divergence between posterior and prior with balancing and free nats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from apv_fast.ops.check import Arguments
from apv_fast.ops.op import Kernel, Op
from apv_fast.types import state_dtype


class KlBalance(NamedTuple):
    """Checked arguments of :func:`kl_balance`."""

    post_logit: Tensor  # [B, T, S, C]
    prior_logit: Tensor
    balance: float
    free: float
    free_avg: bool
    forward: bool


class KlBalanceNormal(NamedTuple):
    """Checked arguments of :func:`kl_balance_normal`."""

    post_mean: Tensor  # [B, T, S]
    post_std: Tensor
    prior_mean: Tensor
    prior_std: Tensor
    balance: float
    free: float
    free_avg: bool
    forward: bool


CATEGORICAL: Op[KlBalance, Sequence[Tensor]] = Op(
    "kl_balance", KlBalance, decides=lambda call: call.post_logit, returns="(Tensor, Tensor)"
)
NORMAL: Op[KlBalanceNormal, Sequence[Tensor]] = Op(
    "kl_balance_normal", KlBalanceNormal, decides=lambda call: call.post_mean, returns="(Tensor, Tensor)"
)


class Divergence(NamedTuple):
    """What kernels are called with: a weighted KL(p ‖ q), of which the weights go to the gradients alone."""

    statistics: list[Tensor]  # the logits of p and q, or means and deviations of p, then of q
    p_weight: float  # of p's gradients
    q_weight: float
    free: float  # nats
    per_step: bool  # which of them are free: of each step, else of the mean


def like_divergence(call: Divergence, keep: bool) -> list[Tensor]:
    """Empty loss and value ``[B, T]`` and, with ``keep``, its mean."""
    first = call.statistics[0]
    value = first.new_empty(first.shape[:2], dtype=state_dtype(first.dtype))
    return [value.new_empty(()), value, *([value.new_empty(())] if keep else [])]


Balance = Callable[..., tuple[Tensor, Tensor]]


def balanced(kernel: Kernel[Divergence]) -> tuple[Balance, Balance]:
    """``kl_balance`` and ``kl_balance_normal`` of a kernel that makes loss and value."""

    def run(
        post: list[Tensor], prior: list[Tensor], balance: float, free: float, free_avg: bool, prior_first: bool
    ) -> tuple[Tensor, Tensor]:
        p, q = (prior, post) if prior_first else (post, prior)
        p_weight = balance if prior_first else 1 - balance
        weights = (1.0, 1.0) if balance == 0.5 else (p_weight, 1 - p_weight)
        loss, value = kernel(p + q, *weights, free, balance == 0.5 or not free_avg)
        return loss, value

    def categorical(*fields: Any) -> tuple[Tensor, Tensor]:
        call = KlBalance(*fields)
        return run([call.post_logit], [call.prior_logit], *call[2:])

    def normal(*fields: Any) -> tuple[Tensor, Tensor]:
        call = KlBalanceNormal(*fields)
        return run([call.post_mean, call.post_std], [call.prior_mean, call.prior_std], *call[4:])

    return categorical, normal


def _check_settings(arguments: Arguments, balance: float, free: float) -> None:
    arguments.require(0 <= balance <= 1, f"balance is {balance}; it must be in [0, 1]")
    arguments.require(free >= 0, f"free is {free}; it must be at least 0 (nats)")


def kl_balance(
    post_logit: Tensor,
    prior_logit: Tensor,
    *,
    balance: float = 0.8,
    free: float = 0.0,
    free_avg: bool = True,
    forward: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``(1 − balance)·max(KL(post ‖ sg(prior)), free) + balance·max(KL(sg(post) ‖ prior), free)``, categorical latents.

    Args:
        post_logit: ``[B, T, S, C]`` logits, any floating dtype; the arithmetic is in float32 at least.
        prior_logit: the same.
        balance: weight of the term that trains the prior; 0.5 gives the plain KL with free nats a step.
        free: nats below which the divergence costs nothing more.
        free_avg: compare ``free`` with the mean over steps instead of with every step.
        forward: swap posterior and prior.
        backend: see :mod:`apv_fast.backend`.

    Returns:
        ``(loss, value)``: a differentiable scalar, and the divergence of every step ``[B, T]`` in nats, detached.

    Raises:
        TypeError: an argument is no floating tensor, or their dtypes differ.
        ValueError: shapes do not fit, or a setting is out of range.

    Source: Hafner et al. 2021, algorithm 2.
    """
    arguments = Arguments("kl_balance")
    arguments.tensor("post_logit", post_logit, "B T S C")
    arguments.tensor("prior_logit", prior_logit, "B T S C", post_logit.dtype)
    _check_settings(arguments, balance, free)
    loss, value = CATEGORICAL(KlBalance(post_logit, prior_logit, balance, free, free_avg, forward), backend)
    return loss, value


def kl_balance_normal(
    post_mean: Tensor,
    post_std: Tensor,
    prior_mean: Tensor,
    prior_std: Tensor,
    *,
    balance: float = 0.8,
    free: float = 0.0,
    free_avg: bool = True,
    forward: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`kl_balance` for Gaussian latents: means and standard deviations ``[B, T, S]``."""
    arguments = Arguments("kl_balance_normal")
    arguments.tensor("post_mean", post_mean, "B T S")
    arguments.tensor("post_std", post_std, "B T S", post_mean.dtype)
    arguments.tensor("prior_mean", prior_mean, "B T S", post_mean.dtype)
    arguments.tensor("prior_std", prior_std, "B T S", post_mean.dtype)
    _check_settings(arguments, balance, free)
    call = KlBalanceNormal(post_mean, post_std, prior_mean, prior_std, balance, free, free_avg, forward)
    loss, value = NORMAL(call, backend)
    return loss, value

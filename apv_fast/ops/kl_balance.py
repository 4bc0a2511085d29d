"""KL divergence between posterior and prior with balancing and free nats."""

from __future__ import annotations

import torch
from torch import Tensor

from apv_fast.backend import resolve
from apv_fast.ops.check import Arguments
from apv_fast.ops.library import define


@define(
    "kl_balance(Tensor post_logit, Tensor prior_logit, float balance, float free, bool free_avg, bool forward, "
    "str backend) -> (Tensor, Tensor)"
)
def _kl_balance(
    post_logit: Tensor,
    prior_logit: Tensor,
    balance: float,
    free: float,
    free_avg: bool,
    forward: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    function = resolve("kl_balance", post_logit, backend)
    result: tuple[Tensor, Tensor] = function(post_logit, prior_logit, balance, free, free_avg, forward)
    return result


@define(
    "kl_balance_normal(Tensor post_mean, Tensor post_std, Tensor prior_mean, Tensor prior_std, float balance, "
    "float free, bool free_avg, bool forward, str backend) -> (Tensor, Tensor)"
)
def _kl_balance_normal(
    post_mean: Tensor,
    post_std: Tensor,
    prior_mean: Tensor,
    prior_std: Tensor,
    balance: float,
    free: float,
    free_avg: bool,
    forward: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    function = resolve("kl_balance_normal", post_mean, backend)
    result: tuple[Tensor, Tensor] = function(
        post_mean, post_std, prior_mean, prior_std, balance, free, free_avg, forward
    )
    return result


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
    result: tuple[Tensor, Tensor] = torch.ops.apv_fast.kl_balance(
        post_logit, prior_logit, balance, free, free_avg, forward, backend or ""
    )
    return result


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
    result: tuple[Tensor, Tensor] = torch.ops.apv_fast.kl_balance_normal(
        post_mean, post_std, prior_mean, prior_std, balance, free, free_avg, forward, backend or ""
    )
    return result

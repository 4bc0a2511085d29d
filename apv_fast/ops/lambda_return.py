"""The λ-return of imagined sequences."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from apv_fast.ops.check import Arguments
from apv_fast.ops.op import Op


class LambdaReturn(NamedTuple):
    """Checked arguments."""

    reward: Tensor  # [H, N]
    value: Tensor  # [H, N]
    discount: Tensor  # [H, N]
    bootstrap: Tensor  # [N]
    lambda_: float


def like_rewards(call: LambdaReturn, _: bool) -> list[Tensor]:
    """Empty returns."""
    return [call.reward.new_empty(call.reward.shape)]


OP: Op[LambdaReturn, Tensor] = Op("lambda_return", LambdaReturn, decides=lambda call: call.reward)


def lambda_return(
    reward: Tensor,
    value: Tensor,
    discount: Tensor,
    bootstrap: Tensor,
    *,
    lambda_: float = 0.95,
    backend: str | None = None,
) -> Tensor:
    """``G_t = r_t + γ_t((1 − λ)v_{t+1} + λG_{t+1})`` with ``v_H = G_H = bootstrap``.

    Imagined sequences are horizon-first.

    Args:
        reward: ``[H, N]``, H ≥ 1, any floating dtype; sums are in float32 at least.
        value: ``[H, N]``; its first row has no effect.
        discount: ``[H, N]``, γ_t in [0, 1].
        bootstrap: ``[N]``, the value after the last step.
        lambda_: the mixture, in [0, 1].
        backend: see :mod:`apv_fast.backend`.

    Returns:
        ``[H, N]``, dtype of ``reward``; differentiable with respect to all four tensors.

    Raises:
        TypeError: an argument is no floating tensor, or their dtypes differ.
        ValueError: shapes do not fit, H = 0 or ``lambda_`` outside [0, 1].

    Source: Hafner et al. 2021, equation 4.
    """
    arguments = Arguments("lambda_return")
    arguments.tensor("reward", reward, "H N")
    arguments.tensor("value", value, "H N", reward.dtype)
    arguments.tensor("discount", discount, "H N", reward.dtype)
    arguments.tensor("bootstrap", bootstrap, "N", reward.dtype)
    arguments.require(len(reward) > 0, "reward has no steps; H must be at least 1")
    arguments.require(0 <= lambda_ <= 1, f"lambda_ is {lambda_}; it must be in [0, 1]")
    return OP(LambdaReturn(reward, value, discount, bootstrap, lambda_), backend)

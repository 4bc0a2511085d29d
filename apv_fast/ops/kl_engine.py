"""``kl_balance`` and ``kl_balance_normal`` around an engine, as one opaque op that autograd knows.

``statistics`` are the logits of p and q, or means and deviations of p, then of q. The loss is a weighted KL(p ‖ q), of
which the weights go to the gradients alone; see :mod:`apv_fast.reference.kl_balance` for what it means.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from apv_fast.types import state_dtype

_SETTINGS = "float p_weight, float q_weight, float free, bool per_step"


class Settings(NamedTuple):
    """What decides the loss, in the schema's order."""

    p_weight: float  # of p's gradients
    q_weight: float
    free: float  # nats
    per_step: bool  # which of them are free: of each step, else of the mean


class Engine(Protocol):
    """What computes it."""

    def forward(self, statistics: list[Tensor], settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, value ``[B, T]`` and its mean."""

    def backward(
        self, grad: Tensor, statistics: list[Tensor], value: Tensor, mean: Tensor, settings: Settings
    ) -> list[Tensor]:
        """Gradients of the statistics, contiguous."""


Balance = Callable[..., tuple[Tensor, Tensor]]


def define_kl(name: str, engine: Engine) -> tuple[Balance, Balance]:
    """``kl_balance`` and ``kl_balance_normal`` on ``engine``, behind the opaque op ``apv_fast::kl_NAME``."""

    @torch.library.custom_op(
        f"apv_fast::kl_{name}",
        mutates_args=(),
        schema=f"(Tensor[] statistics, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
    )
    def op(statistics: list[Tensor], *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
        return engine.forward(statistics, Settings(*settings))

    @torch.library.custom_op(
        f"apv_fast::kl_{name}_backward",
        mutates_args=(),
        schema=f"(Tensor grad, Tensor[] statistics, Tensor value, Tensor mean, {_SETTINGS}) -> Tensor[]",
    )
    def backward(grad: Tensor, statistics: list[Tensor], value: Tensor, mean: Tensor, *settings: Any) -> list[Tensor]:
        return engine.backward(grad, statistics, value, mean, Settings(*settings))

    @op.register_fake
    def _(statistics: list[Tensor], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        first = statistics[0]
        value = first.new_empty(first.shape[:2], dtype=state_dtype(first.dtype))
        return value.new_empty(()), value, value.new_empty(())

    @backward.register_fake
    def _(grad: Tensor, statistics: list[Tensor], *_: Any) -> list[Tensor]:
        return [x.new_empty(x.shape) for x in statistics]

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        statistics, *ctx.settings = inputs
        ctx.save_for_backward(*statistics, *output[1:])
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
        *statistics, value, mean = ctx.saved_tensors
        gradients = None if grad is None else backward(grad, statistics, value, mean, *ctx.settings)
        return gradients, None, None, None, None

    op.register_autograd(differentiate, setup_context=save)

    def balanced(
        post: list[Tensor], prior: list[Tensor], balance: float, free: float, free_avg: bool, prior_first: bool
    ) -> tuple[Tensor, Tensor]:
        p, q = (prior, post) if prior_first else (post, prior)
        p_weight = balance if prior_first else 1 - balance
        weights = (1.0, 1.0) if balance == 0.5 else (p_weight, 1 - p_weight)
        loss, value, _ = op(p + q, *weights, free, balance == 0.5 or not free_avg)
        return loss, value.detach()

    def kl_balance(
        post_logit: Tensor, prior_logit: Tensor, balance: float, free: float, free_avg: bool, forward: bool
    ) -> tuple[Tensor, Tensor]:
        """The loss, differentiable once, and the divergence ``[B, T]``; see :func:`apv_fast.ops.kl_balance`."""
        return balanced([post_logit], [prior_logit], balance, free, free_avg, forward)

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
        """The same for means and standard deviations ``[B, T, S]``."""
        return balanced([post_mean, post_std], [prior_mean, prior_std], balance, free, free_avg, forward)

    return kl_balance, kl_balance_normal

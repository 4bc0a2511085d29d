"""``kl_balance`` in C++, ``csrc/cpu/kl.cpp``: one pass over the statistics forward, one back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apv_fast import _C
from apv_fast.cpu.pointwise import address, computed, how, wide


def _sizes(tensor: Tensor) -> tuple[int, int, int]:
    """Steps, S and C of ``[B, T, S, C]`` or ``[B, T, S]``; an empty variable counts as none."""
    b, t, s, *c = tensor.shape
    return b * t, s if tensor.numel() else 0, c[0] if c else 0


def _pairs(tensors: list[Tensor]) -> tuple[list[int], list[int]]:
    """Addresses of p's tensors and of q's, two each."""
    half = len(tensors) // 2
    p, q = (([address(x) for x in side] + [0])[:2] for side in (tensors[:half], tensors[half:]))
    return p, q


def _run(
    statistics: list[Tensor], settings: tuple[float, float, float, bool], results: list[Tensor], **way: Any
) -> None:
    p_weight, q_weight, free, per_step = settings
    dense = [x.contiguous() for x in statistics]
    p, q = _pairs(dense)
    _C.kl_loss(
        sizes=_sizes(dense[0]),
        weights=(p_weight, q_weight),
        free=free,
        per_step=per_step,
        p=p,
        q=q,
        results=[address(x) for x in results],
        **way,
        **how(dense[0]),
    )


@torch.library.custom_op(
    "apv_fast::kl_cpu",
    mutates_args=(),
    schema="(Tensor[] statistics, float p_weight, float q_weight, float free, bool per_step) "
    "-> (Tensor, Tensor, Tensor)",
)
def _forward(
    statistics: list[Tensor], p_weight: float, q_weight: float, free: float, per_step: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, value [B, T] and its mean, of the logits (or means and deviations) of p and q."""
    first = statistics[0]
    value = first.new_empty(first.shape[:2], dtype=wide(first.dtype))
    loss, mean = value.new_empty(()), value.new_empty(())
    nothing = (0, 0)
    settings = (p_weight, q_weight, free, per_step)
    _run(statistics, settings, [value, mean, loss], grad=0, grad_p=nothing, grad_q=nothing)
    return loss, value, mean


@torch.library.custom_op(
    "apv_fast::kl_cpu_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor[] statistics, Tensor value, Tensor mean, float p_weight, float q_weight, float free, "
    "bool per_step) -> Tensor[]",
)
def _backward(
    grad: Tensor,
    statistics: list[Tensor],
    value: Tensor,
    mean: Tensor,
    p_weight: float,
    q_weight: float,
    free: float,
    per_step: bool,
) -> list[Tensor]:
    """Gradients of the statistics, contiguous."""
    gradients = [x.new_empty(x.shape) for x in statistics]
    of_p, of_q = _pairs(gradients)
    settings = (p_weight, q_weight, free, per_step)
    _run(statistics, settings, [value, mean, mean], grad=address(grad), grad_p=of_p, grad_q=of_q)
    return gradients


@_forward.register_fake
def _(
    statistics: list[Tensor], p_weight: float, q_weight: float, free: float, per_step: bool
) -> tuple[Tensor, Tensor, Tensor]:
    value = statistics[0].new_empty(statistics[0].shape[:2], dtype=wide(statistics[0].dtype))
    return value.new_empty(()), value, value.new_empty(())


@_backward.register_fake
def _(
    grad: Tensor,
    statistics: list[Tensor],
    value: Tensor,
    mean: Tensor,
    p_weight: float,
    q_weight: float,
    free: float,
    per_step: bool,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in statistics]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    statistics, *ctx.settings = inputs
    ctx.save_for_backward(*statistics, *output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    *statistics, value, mean = ctx.saved_tensors
    gradients = None if grad is None else _backward(grad, statistics, value, mean, *ctx.settings)
    return gradients, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _balance(
    post: list[Tensor], prior: list[Tensor], balance: float, free: float, free_avg: bool, forward: bool
) -> tuple[Tensor, Tensor]:
    p, q = (prior, post) if forward else (post, prior)
    p_weight = balance if forward else 1 - balance
    weights = (1.0, 1.0) if balance == 0.5 else (p_weight, 1 - p_weight)
    statistics = [computed(x) for x in p + q]
    loss, value, _ = _forward(statistics, *weights, free, balance == 0.5 or not free_avg)
    return loss, value.detach()


def kl_balance(
    post_logit: Tensor, prior_logit: Tensor, balance: float, free: float, free_avg: bool, forward: bool
) -> tuple[Tensor, Tensor]:
    """The loss, differentiable once, and the divergence [B, T], of arguments that the op has checked."""
    return _balance([post_logit], [prior_logit], balance, free, free_avg, forward)


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
    """The same for means and standard deviations [B, T, S]."""
    return _balance([post_mean, post_std], [prior_mean, prior_std], balance, free, free_avg, forward)

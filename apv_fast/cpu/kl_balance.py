"""``kl_balance`` in C++, ``csrc/cpu/kl_balance/``: one pass over the statistics forward, one back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apv_fast import _C
from apv_fast.cpu.parts.call import address, computed, how
from apv_fast.ops.kl_balance import Divergence, balanced, like_divergence
from apv_fast.ops.op import Gradients, Kernel


def _sizes(tensor: Tensor) -> tuple[int, int, int]:
    """Steps, S and C of ``[B, T, S, C]`` or ``[B, T, S]``; an empty variable counts as none."""
    b, t, s, *c = tensor.shape
    return b * t, s if tensor.numel() else 0, c[0] if c else 0


def _pairs(tensors: list[Tensor]) -> tuple[list[int], list[int]]:
    """Addresses of p's tensors and of q's, two each."""
    half = len(tensors) // 2
    p, q = (([address(x) for x in side] + [0])[:2] for side in (tensors[:half], tensors[half:]))
    return p, q


def _run(statistics: list[Tensor], call: Divergence, results: list[Tensor], **way: Any) -> None:
    p, q = _pairs(statistics)
    _C.kl_loss(
        sizes=_sizes(statistics[0]),
        weights=(call.p_weight, call.q_weight),
        free=call.free,
        per_step=call.per_step,
        p=p,
        q=q,
        results=[address(x) for x in results],
        **way,
        **how(statistics[0].dtype),
    )


def _dense(statistics: list[Tensor]) -> list[Tensor]:
    """As the kernel reads them."""
    return [computed(x).contiguous() for x in statistics]


def _forward(call: Divergence, keep: bool) -> list[Tensor]:
    loss, value, mean = like_divergence(call, True)
    _run(_dense(call.statistics), call, [value, mean, loss], grad=0, grad_p=(0, 0), grad_q=(0, 0))
    return [loss, value, mean] if keep else [loss, value]


def _backward(call: Divergence, results: list[Tensor], grads: list[Tensor | None], needs: frozenset[str]) -> Gradients:
    (_, value, mean), grad = results, grads[0]
    assert grad is not None
    dense = _dense(call.statistics)
    gradients = [torch.empty_like(x) for x in dense]
    of_p, of_q = _pairs(gradients)
    _run(dense, call, [value, mean, mean], grad=address(grad), grad_p=of_p, grad_q=of_q)
    return {"statistics": [g.to(x.dtype) for g, x in zip(gradients, call.statistics, strict=True)]}


kl_balance, kl_balance_normal = balanced(
    Kernel(
        "kl_balance_cpu",
        Divergence,
        outputs=2,
        forward=_forward,
        backward=_backward,
        fake=like_divergence,
        constant=lambda _: [1],
    )
)

"""``kl_balance`` in C++, ``csrc/cpu/kl.cpp``: one pass over the statistics forward, one back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apv_fast import _C
from apv_fast.cpu.parts.call import address, computed, how
from apv_fast.ops.kl_engine import Settings, define_kl
from apv_fast.types import state_dtype


def _sizes(tensor: Tensor) -> tuple[int, int, int]:
    """Steps, S and C of ``[B, T, S, C]`` or ``[B, T, S]``; an empty variable counts as none."""
    b, t, s, *c = tensor.shape
    return b * t, s if tensor.numel() else 0, c[0] if c else 0


def _pairs(tensors: list[Tensor]) -> tuple[list[int], list[int]]:
    """Addresses of p's tensors and of q's, two each."""
    half = len(tensors) // 2
    p, q = (([address(x) for x in side] + [0])[:2] for side in (tensors[:half], tensors[half:]))
    return p, q


def _run(statistics: list[Tensor], settings: Settings, results: list[Tensor], **way: Any) -> None:
    p, q = _pairs(statistics)
    _C.kl_loss(
        sizes=_sizes(statistics[0]),
        weights=(settings.p_weight, settings.q_weight),
        free=settings.free,
        per_step=settings.per_step,
        p=p,
        q=q,
        results=[address(x) for x in results],
        **way,
        **how(statistics[0].dtype),
    )


def _dense(statistics: list[Tensor]) -> list[Tensor]:
    """As the kernel reads them."""
    return [computed(x).contiguous() for x in statistics]


class _Kernel:
    """:class:`apv_fast.ops.kl_engine.Engine`."""

    def forward(self, statistics: list[Tensor], settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
        first, nothing = statistics[0], (0, 0)
        value = first.new_empty(first.shape[:2], dtype=state_dtype(first.dtype))
        loss, mean = value.new_empty(()), value.new_empty(())
        _run(_dense(statistics), settings, [value, mean, loss], grad=0, grad_p=nothing, grad_q=nothing)
        return loss, value, mean

    def backward(
        self, grad: Tensor, statistics: list[Tensor], value: Tensor, mean: Tensor, settings: Settings
    ) -> list[Tensor]:
        dense = _dense(statistics)
        gradients = [torch.empty_like(x) for x in dense]
        of_p, of_q = _pairs(gradients)
        _run(dense, settings, [value, mean, mean], grad=address(grad), grad_p=of_p, grad_q=of_q)
        return [g.to(x.dtype) for g, x in zip(gradients, statistics, strict=True)]


kl_balance, kl_balance_normal = define_kl("cpu", _Kernel())

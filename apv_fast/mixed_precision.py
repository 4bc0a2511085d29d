"""Weights in the dtype of the products: a cast, or the copy that an optimiser writes along with the weight.

A copy is used while it is the weight's: :func:`cast` and :func:`refresh_copies` compare the weight's version counter
and address with what they were when it was written, and write it again if anything else has changed the weight since
(``load_state_dict``, in-place operations, other memory). So a copy is always what a cast would give, bit for bit.

Limits: a change through ``weight.data.copy_()`` and the like escapes version counters; nothing here does that. The
weights of a module's copy have none, and a compiled module has none: they are cast.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary


@dataclass
class _Copy:
    tensor: Tensor  # the weight's shape and strides
    written: tuple[int, int]  # version and address of the weight when this was last its copy


_copies: Any = WeakIdKeyDictionary()  # weight -> _Copy


def keep_copy(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Make a copy of ``weight`` in ``dtype``, which :func:`cast` gives from now on.

    Whoever writes it in the step that writes the weight calls :func:`mark_written`.
    """
    copy = weight.detach().to(dtype, copy=True)
    _copies[weight] = _Copy(copy, _state(weight))
    return copy


def mark_written(weights: Iterable[Tensor]) -> None:
    """Say that the copies of ``weights``, of those that have one, have just been written with them."""
    for weight in weights:
        if (copy := _copies.get(weight)) is not None:
            copy.written = _state(weight)


def refresh_copies(weights: Iterable[Tensor]) -> None:
    """Write the copies of ``weights`` that are not what a cast would give."""
    for weight in weights:
        if (copy := _copies.get(weight)) is not None and copy.written != _state(weight):
            with torch.no_grad():
                copy.tensor.copy_(weight)
            copy.written = _state(weight)


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight.to(dtype)``, differentiable; without a pass over memory if there is a copy."""
    if weight.dtype == dtype:
        return weight
    copy = None if torch.compiler.is_compiling() else _copies.get(weight)
    if copy is None or copy.tensor.dtype != dtype or copy.tensor.device != weight.device:
        return weight.to(dtype)
    refresh_copies([weight])
    result: Tensor = _Cast.apply(weight, copy.tensor)  # type: ignore[no-untyped-call]
    return result


def cast_layers(layers: Iterable[nn.Module], dtype: torch.dtype) -> list[Tensor]:
    """Weight and bias of each layer in turn, see :func:`cast`."""
    return [cast(x, dtype) for layer in layers for x in (layer.weight, layer.bias)]  # type: ignore[arg-type]


def _state(weight: Tensor) -> tuple[int, int]:
    return weight._version, weight.data_ptr()


class _Cast(torch.autograd.Function):
    """The copy as a function of the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return copy.detach()  # shares its version counter: a step before the backward pass is noticed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None

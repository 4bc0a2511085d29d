"""The trunk of reward, discount, actor and critic: dense layers with ELU, all of them in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from apv_fast.ops.check import Arguments
from apv_fast.ops.op import Op


class Mlp(NamedTuple):
    """Checked arguments."""

    x: Tensor  # [N, F]
    layers: list[Tensor]  # weight and bias in turn


OP: Op[Mlp, Tensor] = Op("mlp", Mlp, decides=lambda call: call.layers[0])


def mlp(x: Tensor, layers: Sequence[tuple[Tensor, Tensor]], *, backend: str | None = None) -> Tensor:
    """``elu(… elu(x·W₁ᵀ + b₁) …·Wₙᵀ + bₙ)``, differentiable with respect to everything.

    Args:
        x: ``[..., F]``, floating; it is rounded to the weights' dtype, which is that of all products.
        layers: weights ``[units, units before]`` and biases ``[units]``, first to last, at least one, of one dtype.
        backend: see :mod:`apv_fast.backend`.

    Returns:
        ``[..., units of the last layer]`` in the dtype of the weights.

    Raises:
        TypeError: an argument is no tensor, or dtypes differ.
        ValueError: shapes do not fit, or there are no layers.

    Source: the MLP heads of DreamerV2 (Hafner et al. 2021).
    """
    arguments = Arguments("mlp")
    arguments.require(len(layers) > 0, "layers is empty; there must be at least one")
    leading = [f"N{i}" for i in range(x.dim() - 1)] if isinstance(x, Tensor) else []
    arguments.tensor("x", x, " ".join([*leading, "F"]))
    arguments.require(x.shape[-1] > 0, "x has no features; F must be at least 1")
    before, dtype = "F", getattr(layers[0][0], "dtype", None)
    for i, (weight, bias) in enumerate(layers):
        arguments.tensor(f"layers[{i}] weight", weight, f"U{i} {before}", dtype)
        arguments.tensor(f"layers[{i}] bias", bias, f"U{i}", dtype)
        before = f"U{i}"
    rows = x.reshape(-1, x.shape[-1])
    result = OP(Mlp(rows, [w for layer in layers for w in layer]), backend)
    return result.view(*x.shape[:-1], result.shape[-1])

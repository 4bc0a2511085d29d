"""Keras' default initialisation: Glorot-uniform weights, zero biases; and dense layers in a chosen dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apv_fast.mixed_precision import cast_layers


def keras_init(module: nn.Module) -> None:
    """Initialise every Dense and convolution inside ``module`` as Keras would."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def dense(layer: nn.Linear, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``layer(x)`` with the product in ``dtype``; the weights stay in their own.

    Raises:
        ValueError: the last size of ``x`` is not what the layer takes.
    """
    if x.shape[-1] != layer.in_features:
        raise ValueError(f"the features have shape {tuple(x.shape)}; their last size must be {layer.in_features}")
    return F.linear(x.to(dtype), *cast_layers([layer], dtype))

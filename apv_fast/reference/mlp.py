"""Dense layers with ELU, one after the other."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def mlp(x: Tensor, layers: list[Tensor]) -> Tensor:
    """``[N, F] → [N, units of the last layer]`` in the dtype of ``layers``: weight, bias, weight, bias, …"""
    x = x.to(layers[0].dtype)
    for weight, bias in zip(layers[::2], layers[1::2], strict=True):
        x = F.elu(F.linear(x, weight, bias))
    return x

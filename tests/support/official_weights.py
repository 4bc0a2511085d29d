"""The official implementation's weights and gradients in our modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from apv_fast.official import our_layout, our_name


def under(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def load(module: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Set every parameter that ``arrays`` names; one that does not exist or has another shape is an error."""
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, array in arrays.items():
            parameters[our_name(name)].copy_(our_layout(array).view_as(parameters[our_name(name)]))


def gradients(
    module: nn.Module, arrays: Mapping[str, np.ndarray], key: Callable[[str], str] = str
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """``(name, our gradient, official gradient)`` of every array; no gradient counts as zero."""
    parameters = dict(module.named_parameters())
    for name, array in arrays.items():
        parameter = parameters[our_name(name)]
        ours = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        yield key(name), ours, our_layout(array)

"""The official implementation's weights, by name and layout, in our modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

# Official layer name (relative to its module) -> ours. Kernel layouts are converted by rank.
_RENAMES: tuple[tuple[str, str], ...] = (
    (r"^gru\.norm\.gamma$", "gru_norm.weight"),
    (r"^gru\.norm\.beta$", "gru_norm.bias"),
    (r"^(img_in|img_out|img_dist|obs_out|obs_dist|gru)(?:_0)?\.kernel$", r"\1.weight"),
    (r"^(img_in|img_out|img_dist|obs_out|obs_dist|gru)(?:_0)?\.bias$", r"\1.bias"),
    (r"^convin\.kernel$", "dense.weight"),
    (r"^convin\.bias$", "dense.bias"),
    (r"^conv(\d)\.kernel$", r"convs.\1.weight"),
    (r"^conv(\d)\.bias$", r"convs.\1.bias"),
    (r"^dense(\d)\.kernel$", r"trunk.layers.\1.weight"),
    (r"^dense(\d)\.bias$", r"trunk.layers.\1.bias"),
    (r"^out\.(out|std)\.kernel$", r"\1.weight"),
    (r"^out\.(out|std)\.bias$", r"\1.bias"),
)


def our_name(official: str) -> str:
    """The parameter that holds the official variable ``official`` of the same module."""
    for pattern, replacement in _RENAMES:
        if re.match(pattern, official):
            return re.sub(pattern, replacement, official)
    raise KeyError(f"no parameter is known for the official variable {official!r}")


def our_layout(array: np.ndarray) -> Tensor:
    """Dense ``[in, out]`` to ``[out, in]``; convolutions HWIO to OIHW and transposed ones HWOI to IOHW."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return {4: lambda x: x.permute(3, 2, 0, 1), 2: lambda x: x.T}.get(tensor.dim(), lambda x: x)(tensor)


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

"""The official implementation's weights: the names and layouts that they have in our modules."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor

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

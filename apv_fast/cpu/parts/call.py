"""What calls of the C++ extension have in common: tensors as addresses, dtype, threads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def address(tensor: Tensor | None) -> int:
    """Where a contiguous tensor begins; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def name_of(dtype: torch.dtype) -> str:
    """Without "torch."."""
    return str(dtype).removeprefix("torch.")


def how(dtype: torch.dtype) -> dict[str, Any]:
    """The arguments that say in which dtype and on how many threads to run."""
    return {"dtype": name_of(dtype), "threads": torch.get_num_threads()}


def computed(tensor: Tensor) -> Tensor:
    """The tensor in a dtype that the C++ code reads; float16 becomes float32, differentiably."""
    return tensor.float() if tensor.dtype == torch.float16 else tensor

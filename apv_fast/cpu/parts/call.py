"""What calls of the C++ extension have in common: tensors as addresses, dtype, threads, instruction set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apv_fast.cpu import isa


def address(tensor: Tensor | None) -> int:
    """Where a contiguous tensor begins; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def name_of(dtype: torch.dtype) -> str:
    """Without "torch."."""
    return str(dtype).removeprefix("torch.")


def how(dtype: torch.dtype) -> dict[str, Any]:
    """The arguments that say in which dtype, on how many threads and with which instructions to run."""
    return {"dtype": name_of(dtype), "threads": torch.get_num_threads(), "isa": isa()}


def computed(tensor: Tensor) -> Tensor:
    """The tensor in a dtype that the C++ code reads; float16 becomes float32, differentiably."""
    return tensor.float() if tensor.dtype == torch.float16 else tensor

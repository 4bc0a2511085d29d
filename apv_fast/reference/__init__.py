"""The reference: plain PyTorch, to be read beside the paper; every backend is tested against it."""

from __future__ import annotations

import torch

from apv_fast.backend import Status


def probe() -> Status:
    """Always available, on whatever device torch has."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return Status(True, devices=devices, isa=f"PyTorch {torch.__version__}", dtypes=dtypes)

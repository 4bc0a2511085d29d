"""What must be set before any test module is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # Without a GPU, Triton's kernels run in its interpreter. Triton reads this when it is imported, so it cannot wait
    # for a fixture. Tests that need the compiler start a process without it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

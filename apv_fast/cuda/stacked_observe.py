"""``stacked_observe`` on the CUDA library: one scan after the other with one product between.

A wavefront would halve the barriers, but the weights of both models, 33.6 MB at full size, do not stay on a chip, and
reading the rest at every step costs what it saves.
"""

from __future__ import annotations

from torch import Tensor

from apv_fast.cuda import rssm_observe as one
from apv_fast.recurrence.stacked import TwoScans, stacked_on

stacked_observe = stacked_on("cuda", TwoScans(one.scan))


def obstacle(
    tensor: Tensor, *, af_deter: int, af_hidden: int, af_stoch: int, af_discrete: int, batch: int, **sizes: int
) -> str:
    """Why scans of these sizes do not fit the tensor's device; empty if they do."""
    lower = one.obstacle(tensor, batch, af_deter, af_hidden, af_stoch, af_discrete)
    return lower or one.obstacle(tensor, batch, **sizes)

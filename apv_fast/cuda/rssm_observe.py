"""``rssm_observe`` and ``stacked_observe`` on the CUDA library.

A stack is one scan after the other with one product between: a wavefront would halve the barriers, but the weights of
both models, 33.6 MB at full size, do not stay on a chip, and reading the rest at every step costs what it saves.
"""

from __future__ import annotations

from torch import Tensor

from apv_fast.cuda import library
from apv_fast.cuda.parts.recurrence import CudaCore
from apv_fast.recurrence.observe import define_observe
from apv_fast.recurrence.stacked import TwoScans, define_stacked
from apv_fast.types import Latent

core = CudaCore(library)
observe = define_observe("cuda", core)
stacked_observe = define_stacked("cuda", TwoScans(core))


def obstacle(tensor: Tensor, batch: int, deter: int, hidden: int, stoch: int, discrete: int) -> str:
    """Why scans of these sizes do not fit the tensor's device; empty if they do."""
    return core.obstacle(tensor.device, batch, deter, hidden, Latent(stoch, discrete))


def stacked_obstacle(
    tensor: Tensor, *, af_deter: int, af_hidden: int, af_stoch: int, af_discrete: int, batch: int, **sizes: int
) -> str:
    """The same of two models."""
    return obstacle(tensor, batch, af_deter, af_hidden, af_stoch, af_discrete) or obstacle(tensor, batch, **sizes)

"""``rssm_observe`` on the CUDA library."""

from __future__ import annotations

from torch import Tensor

from apv_fast.cuda import library
from apv_fast.cuda.scan import CudaCore
from apv_fast.scan.observe import define_observe
from apv_fast.structure import Latent

core = CudaCore(library)
observe = define_observe("cuda", core)


def obstacle(tensor: Tensor, batch: int, deter: int, hidden: int, stoch: int, discrete: int) -> str:
    """Why scans of these sizes do not fit the tensor's device; empty if they do."""
    return core.obstacle(tensor.device, batch, deter, hidden, Latent(stoch, discrete))

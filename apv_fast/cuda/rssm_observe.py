"""``rssm_observe`` on the CUDA library."""

from __future__ import annotations

from torch import Tensor

from apv_fast.cuda import library
from apv_fast.cuda.parts.recurrence import CudaScan
from apv_fast.recurrence.observe import observe_on
from apv_fast.types import Latent

scan = CudaScan(library)
rssm_observe = observe_on("cuda", scan)


def obstacle(tensor: Tensor, batch: int, deter: int, hidden: int, stoch: int, discrete: int) -> str:
    """Why scans of these sizes do not fit the tensor's device; empty if they do."""
    return scan.obstacle(tensor.device, batch, deter, hidden, Latent(stoch, discrete))

"""apv-fast: reinforcement learning with action-free pre-training from videos (APV, Seo et al. 2022), fast."""

import os

import torch

from apv_fast import nn, ops
from apv_fast.backend import BackendError, BackendInfo, backends, use_backend

# OpenMP's threads do not survive a fork, and a child that tries to use them waits for ever: torch's own ops too, and
# the kernels of apv_fast.cpu, which the child may be the first to load. One thread needs no others.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))

__version__ = "0.1.0"

__all__ = ["BackendError", "BackendInfo", "__version__", "backends", "nn", "ops", "use_backend"]

"""apv-fast: reinforcement learning with action-free pre-training from videos (APV, Seo et al. 2022), fast."""

from apv_fast import nn, ops
from apv_fast.backend import BackendError, BackendInfo, backends, use_backend

__version__ = "0.1.0"

__all__ = ["BackendError", "BackendInfo", "__version__", "backends", "nn", "ops", "use_backend"]

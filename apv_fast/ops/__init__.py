"""Functions behind the modules: pure functions of tensors, differentiable where that means something.

All are registered with ``torch.library`` (``torch.ops.apv_fast.*``), so ``torch.compile``, ``opcheck`` and fake tensors
work. Each checks its arguments, then runs on the backend that :mod:`apv_fast.backend` picks.
"""

from apv_fast.ops.image_loss import image_loss, normalize_image
from apv_fast.ops.image_model import image_decoder, image_encoder
from apv_fast.ops.kl_balance import kl_balance, kl_balance_normal
from apv_fast.ops.knn_bonus import knn_bonus
from apv_fast.ops.lambda_return import lambda_return
from apv_fast.ops.mlp import mlp
from apv_fast.ops.noise import sample_noise
from apv_fast.ops.rssm_checks import initial_state
from apv_fast.ops.rssm_imagine import rssm_imagine
from apv_fast.ops.rssm_observe import rssm_observe
from apv_fast.ops.rssm_rollout import rssm_rollout
from apv_fast.ops.rssm_step import rssm_step
from apv_fast.ops.stacked_observe import stacked_observe
from apv_fast.ops.video_bonus import video_bonus
from apv_fast.types import ActorParams, Latent, RSSMParams, State

__all__ = [
    "ActorParams",
    "Latent",
    "RSSMParams",
    "State",
    "image_decoder",
    "image_encoder",
    "image_loss",
    "initial_state",
    "kl_balance",
    "kl_balance_normal",
    "knn_bonus",
    "lambda_return",
    "mlp",
    "normalize_image",
    "rssm_imagine",
    "rssm_observe",
    "rssm_rollout",
    "rssm_step",
    "sample_noise",
    "stacked_observe",
    "video_bonus",
]

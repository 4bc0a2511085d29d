"""Modules: the RSSM and its stack, the bonus, encoder, decoder and heads. They drop into other Dreamer-style code.

All of them have ``save_pretrained(path)`` and ``from_pretrained(path)``, see :mod:`apv_fast.nn.saving`.
"""

from apv_fast.nn.cnn import Decoder, Encoder, normalize
from apv_fast.nn.heads import Actor, Critic, MLPHead
from apv_fast.nn.rssm import RSSM, StackedRSSM
from apv_fast.nn.saving import SavedModuleError
from apv_fast.nn.stream_norm import StreamNorm
from apv_fast.nn.video_bonus import VideoBonus
from apv_fast.reference.distributions import OneHot, TruncatedNormal

__all__ = [
    "RSSM",
    "Actor",
    "Critic",
    "Decoder",
    "Encoder",
    "MLPHead",
    "OneHot",
    "SavedModuleError",
    "StackedRSSM",
    "StreamNorm",
    "TruncatedNormal",
    "VideoBonus",
    "normalize",
]

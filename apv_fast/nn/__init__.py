"""Modules: the RSSM and its stack, the bonus, encoder, decoder and heads. They drop into other Dreamer-style code."""

from apv_fast.nn.bonus import StreamNorm, VideoBonus
from apv_fast.nn.cnn import Decoder, Encoder, normalize
from apv_fast.nn.distributions import OneHot, TruncatedNormal
from apv_fast.nn.heads import Actor, Critic, MLPHead
from apv_fast.nn.rssm import RSSM, StackedRSSM

__all__ = [
    "RSSM",
    "Actor",
    "Critic",
    "Decoder",
    "Encoder",
    "MLPHead",
    "OneHot",
    "StackedRSSM",
    "StreamNorm",
    "TruncatedNormal",
    "VideoBonus",
    "normalize",
]

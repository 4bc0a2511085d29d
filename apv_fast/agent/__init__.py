"""The agent: world models, behaviour, one update, acting, and what it predicts. Reads like the paper."""

from apv_fast.agent.acting import Memory
from apv_fast.agent.agent import Agent, Pretrainer
from apv_fast.agent.behavior import Behavior, ImaginationNoise
from apv_fast.agent.world_model import StackNoise, VideoModel, WorldModel

__all__ = [
    "Agent",
    "Behavior",
    "ImaginationNoise",
    "Memory",
    "Pretrainer",
    "StackNoise",
    "VideoModel",
    "WorldModel",
]

"""Episodes on disk and the replay that draws sequences from them."""

from apv_fast.data.atomic import DiskError, atomic_file
from apv_fast.data.device_replay import DeviceRows
from apv_fast.data.episodes import EPISODE_KEYS, VIDEO_KEYS, EpisodeError, read_episode, write_episode
from apv_fast.data.replay import Replay

__all__ = [
    "EPISODE_KEYS",
    "VIDEO_KEYS",
    "DeviceRows",
    "DiskError",
    "EpisodeError",
    "Replay",
    "atomic_file",
    "read_episode",
    "write_episode",
]

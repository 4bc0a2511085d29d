"""Episodes on disk and the replay that draws sequences from them."""

from apv_fast.data.atomic import DiskError, atomic_file
from apv_fast.data.device_replay import DeviceRows
from apv_fast.data.episodes import EPISODE_KEYS, VIDEO_KEYS, EpisodeError, read_episode, write_episode
from apv_fast.data.replay import Replay
from apv_fast.data.store import StoredEpisode, StoreError, StoreWriter, VideoStore, is_store

__all__ = [
    "EPISODE_KEYS",
    "VIDEO_KEYS",
    "DeviceRows",
    "DiskError",
    "EpisodeError",
    "Replay",
    "StoreError",
    "StoreWriter",
    "StoredEpisode",
    "VideoStore",
    "atomic_file",
    "is_store",
    "read_episode",
    "write_episode",
]

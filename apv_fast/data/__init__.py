"""Videos and episodes on disk, and what draws sequences from them: the replay, and the dataset for pre-training."""

from apv_fast.atomic_file import DiskError, atomic_file
from apv_fast.data.device_replay import DeviceRows
from apv_fast.data.episodes import EPISODE_KEYS, VIDEO_KEYS, EpisodeError, read_episode, write_episode
from apv_fast.data.open_dataset import open_videos
from apv_fast.data.prefetch import Prefetcher
from apv_fast.data.replay import Replay
from apv_fast.data.store import StoredEpisode, StoreError, StoreWriter, VideoStore, is_store
from apv_fast.data.video_dataset import VideoDataset

__all__ = [
    "EPISODE_KEYS",
    "VIDEO_KEYS",
    "DeviceRows",
    "DiskError",
    "EpisodeError",
    "Prefetcher",
    "Replay",
    "StoreError",
    "StoreWriter",
    "StoredEpisode",
    "VideoDataset",
    "VideoStore",
    "atomic_file",
    "is_store",
    "open_videos",
    "read_episode",
    "write_episode",
]

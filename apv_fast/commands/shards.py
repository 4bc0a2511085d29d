"""``apv-fast shards``: a store as tar files, for training on many machines."""

from __future__ import annotations

from pathlib import Path

from apv_fast.commands.common import user_settings
from apv_fast.config import ShardsConfig
from apv_fast.data import VideoStore
from apv_fast.data.shards import write_shards
from apv_fast.run import Progress, stop_on_signal


def shards(config: ShardsConfig) -> Path:
    """Write the shards that are not there yet; returns their folder.

    Raises:
        ConfigError: a number is too small.
        StoreError: there is no store, or the folder has shards of another one or other settings.
        KeyboardInterrupt: the user stopped it; finished shards are there, and the same command goes on.
    """
    store = VideoStore(config.store)
    with user_settings(), stop_on_signal() as stop:
        steps = write_shards(
            store, config.out, chunk_frames=config.chunk_frames, shard_bytes=config.shard_mib * 2**20, seed=config.seed
        )
        done, total = next(steps)
        with Progress("shards", total, unit="shard") as progress:
            while done < total and not stop.requested:
                done, _ = next(steps)
                progress.update(done)
    if done < total:
        raise KeyboardInterrupt(f"stopped at {done} of {total} shards; the same command goes on")
    print(f"{total} shards: apv-fast pretrain --data '{config.out}/videos-{{000000..{total - 1:06d}}}.tar'")
    return config.out

"""``apv-fast shards``: a store as tar files, for training on many machines."""

from __future__ import annotations

import shlex
from pathlib import Path

from apv_fast.commands.parts.ingest_card import LICENCE_OF_SOURCES, sample_frames
from apv_fast.config import ShardsConfig, user_settings
from apv_fast.config.command_line import command_line
from apv_fast.data import VideoStore
from apv_fast.data.dataset_card import write_card
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
    if total:
        _write_card(config, store, total)
    print(f"{total} shards: apv-fast pretrain --data '{config.out}/videos-{{000000..{total - 1:06d}}}.tar'")
    return config.out


def _write_card(config: ShardsConfig, store: VideoStore, shards: int) -> None:
    size = sum(path.stat().st_size for path in config.out.glob("*.tar"))
    facts = {
        "episodes": f"{len(store)}, of {store.lengths.min()} to {store.lengths.max()} frames",
        "frames": f"{store.lengths.sum()} of {' × '.join(map(str, store.image_shape))}",
        "size on the disk": f"{size / 1e9:.3g} GB in {shards} files",
        "format": f"WebDataset: pieces of at most {config.chunk_frames} frames in mixed order, with checksums",
    }
    options = command_line("shards", config, ShardsConfig(config.store, Path()))
    write_card(
        config.out,
        title=f"Videos of {config.store.resolve().name} as shards",
        command=f"{options} {shlex.quote(str(config.store))}",
        sources=[f"the store {config.store}; see its own card"],
        facts=facts,
        frames=sample_frames(store),
        licence=LICENCE_OF_SOURCES,
    )

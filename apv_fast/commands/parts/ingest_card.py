"""The card of a store that ``apv-fast ingest`` made: what is in it, and a sheet of its frames."""

from __future__ import annotations

import dataclasses
import shlex
from collections import Counter
from pathlib import Path

import numpy as np

from apv_fast.config import IngestConfig
from apv_fast.data.dataset_card import SHEET_FRAMES, write_card
from apv_fast.data.store import VideoStore

LICENCE_OF_SOURCES = "That of the sources, which apv-fast does not know; see there before passing the videos on."
_NOT_THE_DATA = ("sources", "out", "workers", "verify")  # settings that the episodes do not depend on, or said apart


def write_ingest_card(config: IngestConfig, store: VideoStore, skipped: int) -> Path:
    """Write README.md and contact_sheet.png into the store's folder.

    Args:
        config: of this run.
        store: with at least one episode.
        skipped: sources that are missing in it, or incomplete.
    """
    size = store.lengths.sum() * np.prod(store.image_shape)
    rates = Counter[str]()
    origins = Counter[str]()
    for episode in store:
        rates[f"{episode.fps:g}" if episode.fps else "unknown"] += 1
        origins[episode.name.partition("/")[0]] += 1
    facts = {
        "episodes": f"{len(store)}, of {store.lengths.min()} to {store.lengths.max()} frames",
        "frames": f"{store.lengths.sum()} of {' × '.join(map(str, store.image_shape))}",
        "frames a second": ", ".join(f"{rate} ({count} episodes)" for rate, count in rates.most_common(5)),
        "size on the disk": f"{size / 1e9:.3g} GB",
        "format": "store of apv-fast: raw frames, index and checksums; see apv_fast/data/store.py",
        "frames that are not square": {
            "crop": "cropped to the middle",
            "pad": "padded with black",
            "stretch": "stretched",
        }[config.aspect],
        "skipped sources": f"{skipped}, see skipped.jsonl" if skipped else "none",
    }
    return write_card(
        store.directory,
        title=f"Videos: {', '.join(name for name, _ in origins.most_common(3))}",
        command=_command(config),
        sources=[f"{name}: {count} episodes" for name, count in sorted(origins.items())],
        facts=facts,
        frames=sample_frames(store),
        licence=LICENCE_OF_SOURCES,
    )


def sample_frames(store: VideoStore) -> np.ndarray:
    """Frames from all over the store, uint8 ``[n, height, width, channels]``."""
    ends = np.cumsum(store.lengths)
    count = min(SHEET_FRAMES, int(ends[-1]))
    places = (np.arange(count) * ends[-1]) // count
    episodes = np.searchsorted(ends, places, side="right")
    starts = places - (ends - store.lengths)[episodes]
    return np.concatenate(
        [store.read(int(episode), int(start), 1) for episode, start in zip(episodes, starts, strict=True)]
    )


def _command(config: IngestConfig) -> str:
    """What makes the same episodes, whatever the number of processes."""
    words = ["apv-fast", "ingest", *map(str, config.sources), "--out", str(config.out)]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in _NOT_THE_DATA and value != field.default:
            words += [f"--{field.name.replace('_', '-')}", str(value)]
    return shlex.join(words)

"""The card of a data set that ``apv-fast collect`` made: what is in it, and a sheet of its frames."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

import apv_fast
from apv_fast.commands.parts.collect_episodes import view_name
from apv_fast.config import PRESETS, CollectConfig
from apv_fast.config.command_line import command_line
from apv_fast.data.collect_writers import EpisodeWriter, Journal
from apv_fast.data.dataset_card import SHEET_FRAMES, write_card

_FORMATS = {
    "npz": "official episode files (npz) with actions and rewards, all views in train_episodes/",
    "mp4": "MP4 files (lossless H.264 4:4:4) in videos/, named by episode and view; no actions",
    "store": "store of raw frames, see apv_fast.data.VideoStore; no actions",
}


def write_collect_card(config: CollectConfig, journal: Journal, writer: EpisodeWriter, fps: float) -> Path:
    """README.md and contact sheet of what the folder has now."""
    views = [view_name(config, camera) for camera in config.cameras or (None,)]
    frames = _sample(journal, writer, views)
    return write_card(
        config.out,
        title=f"Videos of {config.env}",
        command=_command(config),
        sources=[f"{config.env}, rendered by apv-fast {apv_fast.__version__}", f"policy: {config.policy}"],
        facts=_facts(config, journal, views, frames.shape, fps),
        frames=frames,
    )


def _command(config: CollectConfig) -> str:
    """What makes the same data set again, wherever and with however many processes."""
    default = dataclasses.replace(PRESETS["dmc"].collect, env="", out=Path())
    return command_line(
        "collect", dataclasses.replace(config, processes=1, device="auto", backend="auto", list=False), default
    )


def _facts(
    config: CollectConfig, journal: Journal, views: list[str], shape: tuple[int, ...], fps: float
) -> dict[str, str]:
    entries = list(journal.entries.values())
    lengths = [int(entry["frames"]) for entry in entries]
    size = sum(path.stat().st_size for path in config.out.rglob("*") if path.is_file())
    facts = {
        "videos": f"{len(entries) * len(views)}: {len(entries)} episodes, views: {', '.join(views)}",
        "frames": f"{sum(lengths) * len(views)}, {min(lengths)} to {max(lengths)} a video",
        "size of a frame": f"{shape[1]} × {shape[2]}",
        "frames a second": f"{fps:g} (action repeat {config.world.action_repeat})",
        "size on the disk": f"{size / 2**20:.1f} MiB",
        "format": _FORMATS[config.format],
        "rendering": f"{config.world.quality} quality",
        "return": _spread(entry["return"] for entry in entries),
    }
    if "success" in entries[0]:
        facts["success"] = f"{np.mean([entry['success'] for entry in entries]):.0%} of the episodes"
    return facts | {"seed": str(config.seed)}


def _spread(values: Any) -> str:
    every = list(values)
    return f"{np.mean(every):.1f} on average, {min(every):.1f} to {max(every):.1f}"


def _sample(journal: Journal, writer: EpisodeWriter, views: list[str]) -> np.ndarray:
    """Frames from all over the data set, uint8 ``[N, height, width, 3]``, N at most :data:`SHEET_FRAMES`."""
    videos = [(index, view) for index in sorted(journal.entries) for view in views]
    count = min(len(videos), SHEET_FRAMES)
    frames = []
    for place in np.linspace(0, len(videos) - 1, count).round().astype(int):
        video = writer.read(*videos[place])
        times = np.linspace(0, len(video) - 1, SHEET_FRAMES // count + 2)[1:-1].round().astype(int)
        frames.append(video[times])
    return np.concatenate(frames)

"""``apv-fast collect``: render episodes of an environment into a folder of videos."""

from __future__ import annotations

import atexit
import dataclasses
import json
import textwrap
import time
import warnings
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

from apv_fast import envs
from apv_fast.atomic_file import TEMPORARY_SUFFIX, remove_temporaries
from apv_fast.commands.parts.collect_card import write_collect_card
from apv_fast.commands.parts.collect_episodes import EpisodeCollector, view_name
from apv_fast.commands.parts.environments import make_env
from apv_fast.config import CollectConfig, ConfigError, to_dict
from apv_fast.data import atomic_file
from apv_fast.data.collect_writers import EpisodeWriter, Journal, Mp4Writer, NpzWriter, VideoStoreWriter
from apv_fast.data.video_metadata import DATASET_FILE
from apv_fast.run import Progress, StopRequest, stop_on_signal
from apv_fast.run.process_pool import spread

# What a folder's episodes have in common; with another value they would not belong together.
_IDENTITY = ("env", "policy", "cameras", "format", "world", "seed")

_POLICIES = """policies:
  random      uniform actions
  scripted    the experts of metaworld:, one a task
  RUN         the run directory of a policy that apv-fast finetune has trained
"""


def collect(config: CollectConfig) -> Path:
    """Write episodes until there are ``config.episodes``; returns the folder.

    The i-th episode is the same whenever and in whatever process it is made, so an interrupted collection goes on where
    it stopped.

    Raises:
        ConfigError: this cannot be collected, or not into this folder.
        KeyboardInterrupt: the user stopped it; finished episodes are there.
    """
    if config.list:
        show_choices(config)
        return config.out
    config = _checked(config)
    with closing(EpisodeCollector(config)) as collector, ExitStack() as stack:
        height = collector.look()
        created = _describe(config)
        journal = stack.enter_context(Journal(config.out))
        remove_temporaries(config.out)  # of a killed process: this one has the journal now
        writer = stack.enter_context(closing(_writer(config, created, collector.fps, height)))
        collector.stop = stop = stack.enter_context(stop_on_signal())
        _play(config, collector, writer, journal, stop)
        if journal.entries:
            write_collect_card(config, journal, writer, collector.fps)
        left = sum(index not in journal.entries for index in range(config.episodes))
    if left:
        raise KeyboardInterrupt(f"stopped, {left} of {config.episodes} episodes are missing; the same command goes on")
    return config.out


def show_choices(config: CollectConfig) -> None:
    """Print environments by suite, policies and cameras; with ``config.env`` the cameras of that one alone."""
    if config.env:
        with closing(make_env(config.env, config.world, config.seed)) as env:
            inner: Any = env.unwrapped
            names = ", ".join(inner.cameras) or "one view only"
            print(f"{config.env}: cameras: {names}; actions: {env.action_space}")
        return
    for suite in envs.SUITES:
        try:
            ids = envs.list_tasks(suite)
        except ImportError as error:
            print(f"{suite}: not here: {error}\n")
            continue
        print(f"{suite}: {len(ids)} environments")
        print(textwrap.fill(", ".join(ids), 118, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False))
        print()
    print(_POLICIES)
    print("cameras: apv-fast collect --list --env ID shows those of an environment")


def _play(
    config: CollectConfig, collector: EpisodeCollector, writer: EpisodeWriter, journal: Journal, stop: StopRequest
) -> None:
    """Every episode that the journal does not have."""
    missing = [index for index in range(config.episodes) if index not in journal.entries]
    done = config.episodes - len(missing)
    processes = max(1, min(config.processes, len(missing)))
    make = partial(_collector, config) if processes > 1 else lambda: collector
    with Progress("collect", config.episodes, start=done, unit="episode") as progress:
        for episode in spread(make, missing, processes, stop):
            writer.write(episode.index, episode.videos, episode.rows)
            journal.add(episode.index, episode.scores)
            done += 1
            progress.update(done, f"return {episode.scores['return']:.1f}")


def _collector(config: CollectConfig) -> EpisodeCollector:
    """The collector in a process of its own; what there is to warn about, the first one has said."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collector = EpisodeCollector(config)
    atexit.register(collector.close)
    return collector


def _checked(config: CollectConfig) -> CollectConfig:
    """The configuration with one entry a camera.

    Raises:
        ConfigError: a number is too small, or a camera is named twice.
    """
    for name in ("episodes", "processes"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} is {getattr(config, name)}; it must be at least 1")
    cameras = tuple(camera for text in config.cameras for camera in text.split(",") if camera)
    if len(set(cameras)) < len(cameras):
        raise ConfigError(f"cameras are {', '.join(cameras)}; each must be there once")
    return dataclasses.replace(config, cameras=cameras)


def _writer(config: CollectConfig, created: str, fps: float, size: int) -> EpisodeWriter:
    identity = {name: value for name, value in to_dict(config).items() if name in _IDENTITY}
    if config.format == "npz":
        return NpzWriter(config.out, created, json.dumps(identity, sort_keys=True))
    if config.format == "mp4":
        return Mp4Writer(config.out, fps)
    return VideoStoreWriter(config.out, fps, config.world.quality, size, identity)


def _describe(config: CollectConfig) -> str:
    """Record how the videos are made beside them; refuse to mix them with others. Returns when that was begun."""
    path, values = config.out / DATASET_FILE, to_dict(config)
    values = {name: values[name] for name in _IDENTITY}
    if path.exists():
        before: dict[str, Any] = json.loads(path.read_text())
        for name in _IDENTITY:
            if before.get(name) != values[name]:
                raise ConfigError(
                    f"{path}: {name} is {before.get(name)!r} there and {values[name]!r} now; choose another --out"
                )
        created: str = before["created"]
        return created
    if config.out.exists() and any(not one.name.endswith(TEMPORARY_SUFFIX) for one in config.out.iterdir()):
        raise ConfigError(f"out: {config.out} is not empty and was not made by apv-fast collect; choose another --out")
    config.out.mkdir(parents=True, exist_ok=True)
    values |= {"views": [view_name(config, camera) for camera in config.cameras or (None,)]}
    values |= {"created": time.strftime("%Y%m%dT%H%M%S", time.gmtime())}
    with atomic_file(path) as file:
        file.write((json.dumps(values, indent=2) + "\n").encode())
    return str(values["created"])

"""The replay: finished episodes, from which sequences are drawn.

The files are the truth and stay on disk; dropping an episode beyond the capacity only ends its being drawn. Flags,
actions and rewards are held in RAM (about 50 bytes a step), frames in a :class:`FrameCache`.

After a crash: a checkpoint names its episodes, so a resumed run draws from exactly those, in the same order. Episodes
finished between checkpoint and crash stay on disk but are not drawn by that run: it lives through those steps again,
and would otherwise see them twice.

With ``rows`` a copy of everything is on a device and batches are gathered there, the same ones: see
:mod:`apv_fast.data.device_replay`.

Limits: one writer and one thread; sampling is not prefetched (it takes milliseconds).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apv_fast.atomic_file import DiskError
from apv_fast.data.device_replay import DeviceRows
from apv_fast.data.episode_folders import cache_folder, episode_files, episode_folder
from apv_fast.data.episodes import (
    EPISODE_KEYS,
    Episode,
    EpisodeError,
    check_episode,
    read_episode,
    stack_transitions,
    write_episode,
)
from apv_fast.data.frame_cache import FrameCache


@dataclass
class _Stored:
    name: str  # of the file
    place: int  # of its frames in the cache
    frames: int
    arrays: Episode  # all keys but the image

    @property
    def steps(self) -> int:
        return self.frames - 1


class Replay:
    """Sequences of ``chunk_length`` steps, drawn from the newest ``capacity_steps`` steps of finished episodes.

    An episode is drawn uniformly, then a start in it: uniformly too, or with ``prioritize_ends`` the last possible
    start with probability (chunk_length + 1) / (frames + 1) and the others alike (official replay).

    Args:
        directories: folders of episode files, or run or data folders that have them in ``train_episodes/``. New
            episodes go to the first.
        chunk_length: steps in a sequence. Episodes with fewer frames are skipped and counted.
        capacity_steps: steps to draw from, the newest. Official: 2e6 for pre-training, 1e6 for fine-tuning.
        prioritize_ends: see above; on for Meta-world and Atari, off for DMC.
        keys: arrays to read and draw. With ``VIDEO_KEYS`` no action is ever read.
        image_shape: what every frame must be.
        seed: of the draws.
        online: episodes will be added; the folder is made and may be empty. Else at least one must be usable.
        cache_directory: where decoded frames are kept; default: beside the episodes if that is writable.
        rows: keeps a copy on a device, from which batches are drawn as long as it has room.
        pin_memory: batches from the host are in pinned memory, from which copies to a GPU do not wait.

    Raises:
        EpisodeError: no usable episode, and not ``online``. (A damaged file only warns, and is counted.)
    """

    def __init__(
        self,
        directories: Path | str | Sequence[Path | str],
        *,
        chunk_length: int,
        capacity_steps: int = 1_000_000,
        prioritize_ends: bool = False,
        keys: Sequence[str] = EPISODE_KEYS,
        image_shape: tuple[int, int, int] = (64, 64, 3),
        seed: int = 0,
        online: bool = False,
        cache_directory: Path | str | None = None,
        rows: DeviceRows | None = None,
        pin_memory: bool = False,
    ) -> None:
        if chunk_length < 1 or capacity_steps < 1:
            raise ValueError(f"chunk_length and capacity_steps must be positive, not {chunk_length}, {capacity_steps}")
        if missing := {"image", "is_first"} - set(keys):
            raise ValueError(f"keys must include {', '.join(sorted(missing))}; they are {', '.join(keys)}")
        several = [directories] if isinstance(directories, Path | str) else directories
        self.directories = [episode_folder(Path(one), create=online) for one in several]
        self._chunk_length = chunk_length
        self._capacity_steps = capacity_steps
        self._prioritize_ends = prioritize_ends
        self._keys = tuple(keys)
        self._image_shape = image_shape
        self._generator = np.random.default_rng(seed)
        folder = Path(cache_directory) if cache_directory else cache_folder(self.directories[0])
        self._cache = FrameCache(folder, frame_bytes=int(np.prod(image_shape)))
        self._rows, self._pin_memory = rows, pin_memory
        self._episodes: list[_Stored] = []  # oldest first
        self._ongoing: dict[int, list[dict[str, Any]]] = {}  # by stream
        self._total_steps = self._total_episodes = self._short = self._damaged = 0
        self._load()
        if not online and not self._episodes:
            raise EpisodeError(
                ", ".join(map(str, self.directories)),
                "episodes",
                f"none is usable ({self._damaged} damaged, {self._short} with fewer than {chunk_length} frames)",
            )

    @property
    def stats(self) -> dict[str, int]:
        """``steps`` and ``episodes`` that can be drawn; ``total_*``: found at the start and added since; episodes
        ``skipped_*``; size of the decoded frames' file.
        """
        return {
            "steps": sum(episode.steps for episode in self._episodes),
            "episodes": len(self._episodes),
            "total_steps": self._total_steps,
            "total_episodes": self._total_episodes,
            "skipped_short": self._short,
            "skipped_damaged": self._damaged,
            "cache_bytes": self._cache.file_bytes,
        }

    def sample(self, batch_size: int) -> dict[str, Tensor]:
        """Draw sequences.

        Returns:
            For every key ``[batch_size, chunk_length, …]``: ``image`` uint8, ``action`` and ``reward`` float32, flags
            bool. ``is_first`` is set on the first step of each sequence and nowhere else.

        Raises:
            EpisodeError: there is no finished episode yet.
        """
        if not self._episodes:
            raise EpisodeError(self.directories[0], "episodes", "none is finished yet, so nothing can be drawn")
        length = self._chunk_length
        drawn = [self._draw() for _ in range(batch_size)]
        if self._rows is None:
            batch = self._gather(drawn)
        else:
            batch = self._rows.gather([episode.place + start for episode, start in drawn], length)
        batch["is_first"].zero_()
        batch["is_first"][:, 0] = True
        return batch

    def _gather(self, drawn: list[tuple[_Stored, int]]) -> dict[str, Tensor]:
        """The sequences from the host."""
        length = self._chunk_length
        shape = (len(drawn), length, *self._image_shape)
        batch = {"image": torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin_memory)}
        for row, (episode, start) in zip(batch["image"].numpy(), drawn, strict=True):
            self._cache.read_into(episode.place + start, row)
        for key in self._keys:
            if key != "image":
                stacked = np.stack([episode.arrays[key][start : start + length] for episode, start in drawn])
                batch[key] = torch.from_numpy(stacked)
                batch[key] = batch[key].pin_memory() if self._pin_memory else batch[key]
        return batch

    def add(self, transition: Mapping[str, Any], stream: int = 0) -> Path | None:
        """Add one row (``image``, ``action``, ``reward``, ``is_first``, ``is_last``, ``is_terminal``, more if wanted).

        The row with ``is_last`` finishes the episode: it is written to disk and can be drawn from then on. A row with
        ``is_first`` gives up an unfinished one. Each ``stream`` has an episode of its own under way.

        Returns:
            The file of the episode that this row finished; None if none, or if it is too short to be kept.

        Raises:
            EpisodeError: a key is missing or an array is wrong (found when the episode ends); the episode is dropped.
            DiskError: the disk is full. The episode is kept: free some space and call :meth:`finish`.
        """
        if missing := {"is_first", "is_last"} - transition.keys():
            raise EpisodeError("transition", ", ".join(sorted(missing)), "is missing")
        rows = self.ongoing(stream)
        if transition["is_first"]:
            if rows and rows[-1]["is_last"]:
                self.finish(stream)  # it could not be written when it ended
            rows = []
        elif not rows:
            raise EpisodeError("transition", "is_first", "must be set on the first row of an episode")
        rows.append({key: np.array(value) for key, value in transition.items()})
        self._ongoing[stream] = rows
        return self.finish(stream) if transition["is_last"] else None

    def finish(self, stream: int = 0) -> Path | None:
        """Write the ongoing episode as it stands; see :meth:`add`, which calls this."""
        rows = self.ongoing(stream)
        if len(rows) < self._chunk_length:
            self._ongoing.pop(stream, None)
            self._short += 1
            return None
        try:
            episode = stack_transitions(rows)
            check_episode(episode, "new episode", length=len(rows) - 1, image_shape=self._image_shape)
            stored = self._hold(Path("new episode"), episode)
        except EpisodeError:
            del self._ongoing[stream]
            raise
        try:
            path = write_episode(self.directories[0], episode)
        except DiskError:
            self._cache.free(stored.place, stored.frames)
            raise
        stored.name = path.name
        del self._ongoing[stream]
        self._episodes.append(stored)
        self._total_steps += stored.steps
        self._total_episodes += 1
        self._enforce_capacity()
        return path

    def ongoing(self, stream: int = 0) -> list[dict[str, Any]]:
        """The rows of an unfinished episode. Its actions, applied again from the same reset, lead back to its end."""
        return self._ongoing.get(stream, [])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the files: the draws' state, names, counts, the unfinished episode."""
        ongoing = {str(stream): stack_transitions(rows) for stream, rows in self._ongoing.items() if rows}
        return {
            "generator": json.dumps(self._generator.bit_generator.state),
            "episodes": [episode.name for episode in self._episodes],
            "total_steps": self._total_steps,
            "total_episodes": self._total_episodes,
            "ongoing": {
                stream: {key: torch.from_numpy(value) for key, value in episode.items()}
                for stream, episode in ongoing.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> int:
        """Go back to a checkpoint: the same episodes in the same order, the same draws to come.

        Returns:
            How many finished episodes in the folders are newer than the checkpoint: left on disk, not drawn.

        Raises:
            EpisodeError: an episode of the checkpoint is missing or damaged. Nothing has changed then.
        """
        held = {episode.name: episode for episode in self._episodes}
        files = {path.name: path for path in episode_files(self.directories)}
        episodes = []
        for name in state["episodes"]:
            if name not in held:
                path = files.get(name, self.directories[0] / name)
                held[name] = self._hold(path, self._read(path))
            episodes.append(held.pop(name))
        for episode in held.values():
            self._cache.free(episode.place, episode.frames)
        self._episodes = episodes
        self._generator.bit_generator.state = json.loads(state["generator"])
        self._total_steps, self._total_episodes = state["total_steps"], state["total_episodes"]
        self._ongoing = {int(stream): _rows(episode) for stream, episode in state["ongoing"].items()}
        return sum(name > max(state["episodes"], default="") for name in files)

    @property
    def description(self) -> str:
        """Where batches come from."""
        if self._rows is None:
            return "from the host"
        return f"from {self._rows.device} ({self._rows.bytes / 1e9:.3g} GB there)"

    def close(self) -> None:
        """Give the space of the decoded frames back."""
        self._cache.close()

    def _draw(self) -> tuple[_Stored, int]:
        episode = self._episodes[int(self._generator.integers(len(self._episodes)))]
        last = episode.frames - self._chunk_length
        extra = self._chunk_length if self._prioritize_ends else 0
        return episode, min(int(self._generator.integers(last + 1 + extra)), last)

    def _read(self, path: Path) -> Episode:
        return read_episode(path, self._keys, image_shape=self._image_shape)

    def _load(self) -> None:
        """Read the files, newest first, until the capacity is reached."""
        steps = 0
        for path in reversed(episode_files(self.directories)):
            try:
                episode = self._read(path)
                frames = len(episode["image"])
                if frames < self._chunk_length:
                    self._short += 1
                    continue
                if self._episodes and steps + frames - 1 > self._capacity_steps:
                    break
                self._episodes.append(self._hold(path, episode))
            except EpisodeError as error:
                self._damaged += 1
                warnings.warn(f"skipped a damaged episode: {error}", stacklevel=3)
                continue
            steps += frames - 1
        self._episodes.reverse()
        self._total_steps, self._total_episodes = steps, len(self._episodes)

    def _hold(self, path: Path, episode: Episode) -> _Stored:
        """Move a checked episode's frames to the cache, if it is like the others."""
        for key in self._keys:
            if key not in episode:
                raise EpisodeError(path, key, f"is missing; the episode has: {', '.join(episode)}")
        arrays = {key: episode[key] for key in self._keys if key != "image"}
        for key, value in arrays.items():
            like = self._episodes[0].arrays[key] if self._episodes else value
            if value.shape[1:] != like.shape[1:] or value.dtype != like.dtype:
                expected = f"{like.dtype} {list(like.shape[1:])} a step, as in the other episodes"
                raise EpisodeError(path, key, f"must be {expected}, not {value.dtype} {list(value.shape[1:])}")
        place = self._cache.write(episode["image"])
        if self._rows is not None and not self._rows.write(place, {key: episode[key] for key in self._keys}):
            self._rows = None
        return _Stored(path.name, place, len(episode["image"]), arrays)

    def _enforce_capacity(self) -> None:
        steps = sum(episode.steps for episode in self._episodes)
        while len(self._episodes) > 1 and steps > self._capacity_steps:
            oldest = self._episodes.pop(0)
            self._cache.free(oldest.place, oldest.frames)
            steps -= oldest.steps


def _rows(episode: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The rows that were stacked."""
    arrays = {key: value.cpu().numpy() for key, value in episode.items()}
    return [{key: value[row] for key, value in arrays.items()} for row in range(len(next(iter(arrays.values()))))]

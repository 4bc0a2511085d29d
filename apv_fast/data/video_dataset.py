"""Sequences for pre-training, drawn from any mixture of videos.

A source is drawn by its weight, then an episode of it uniformly, then a start as :class:`apv_fast.data.Replay` does.
Without weights a source's weight is its number of episodes: all episodes are drawn alike. Drawing (random numbers,
cheap) and reading (frames) are apart, so that reading can be done ahead and a checkpoint knows what was drawn.

Some episodes may be held out for validation. Each episode's frames decide that alone (by a hash), so it depends neither
on the seed nor on names, order and what else there is, stays as it is when videos are added, and neither the same
video twice nor, in one source, two views of an episode are ever on both sides, where it is known that they are (of
``apv-fast collect``, LeRobot and HDF5).

Limits: frames are 64×64×3; one thread draws (several may read).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from apv_fast.data.corpus import FRAME_SHAPE, Corpus
from apv_fast.data.device_replay import DeviceRows
from apv_fast.data.episodes import EpisodeError
from apv_fast.data.sequence_sampler import SequenceIndices, SequenceSampler
from apv_fast.data.validation_split import held_out

FIXED_SEED = 20220325  # of the sequences for validation and videos: the same in every run
_COPIED = 1024  # frames copied to a device at once


class Stream(Protocol):
    """Sequences that come in an order of their own, see :mod:`apv_fast.data.shards`."""

    source: str
    qualities: set[str]

    def read_into(self, out: np.ndarray) -> None:
        """Fill ``out``, uint8 ``[n, 64, 64, 3]``, with the next sequence."""
        ...

    def restart(self, position: int) -> None:
        """Begin anew, in an order that ``position`` (sequences taken so far) decides."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


@dataclass(frozen=True)
class Position:
    """Where drawing stands: the generator's state, and the sequences taken from every stream."""

    generator: Mapping[str, Any]
    streamed: tuple[int, ...]


class VideoDataset:
    """Batches of ``chunk_length`` frames from several sources.

    Args:
        corpora: videos that can be read anywhere.
        streams: videos that come one after the other.
        weights: of ``corpora`` and then ``streams``; None: the number of episodes, which a stream does not know.
        chunk_length: frames in a sequence (T). Shorter episodes are not drawn.
        prioritize_ends: draw the last possible start of an episode with probability (T + 1) / (frames + 1).
        seed: of the draws.
        validation: share of the episodes to hold out. If it is not 0, at least one episode is held out when there are
            two in a source, and every source keeps one.
        rows: keeps a copy of the training videos on a device, from which batches are drawn, if it has the room.
        pin_memory: batches from the host are in pinned memory, from which copies to a GPU do not wait.

    Raises:
        EpisodeError: there is no usable episode, or none in a source that has a weight.
        ValueError: an argument is wrong.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        streams: Sequence[Stream] = (),
        *,
        weights: Sequence[float] | None = None,
        chunk_length: int,
        prioritize_ends: bool = False,
        seed: int = 0,
        validation: float = 0.0,
        rows: DeviceRows | None = None,
        pin_memory: bool = False,
    ) -> None:
        if not 0 <= validation < 1:
            raise ValueError(f"validation is {validation}; it must be at least 0 and less than 1")
        if streams and weights is None and len(corpora) + len(streams) > 1:
            raise ValueError(
                f"data: give weights (PATH:0.5): it is not known how many episodes {streams[0].source} has"
            )
        self._corpora, self._streams, self._weights = list(corpora), list(streams), weights
        self._length, self._extra = chunk_length, chunk_length if prioritize_ends else 0
        self._validation, self._pin_memory = validation, pin_memory
        self._generator = np.random.default_rng(seed)
        self._streamed = [0] * len(streams)
        self._rows = None if streams else rows
        self._places: list[np.ndarray] = []  # of every corpus's episodes in the rows; made when first needed
        self._divide()

    @property
    def qualities(self) -> set[str]:
        """How the videos were rendered, as far as that is recorded with them."""
        of_corpora = (corpus.qualities for corpus in self._corpora)
        return set().union(*of_corpora, *(stream.qualities for stream in self._streams))

    @property
    def stats(self) -> dict[str, int]:
        """Episodes and frames to train on, ``held_out`` episodes, episodes ``skipped_*``."""
        return {
            "episodes": self._train.count,
            "frames": sum(int(f[e].sum()) for f, e in zip(self._frames, self._train.episodes, strict=True)),
            "held_out": self._held_out,
            "skipped_short": self._short,
            "skipped_damaged": sum(corpus.skipped_damaged for corpus in self._corpora),
        }

    @property
    def description(self) -> str:
        """How many videos, how many were left out and why, where batches come from."""
        stats = self.stats
        text = f"{stats['episodes']} episodes ({stats['frames']} frames)" if self._corpora else ""
        text += f", {stats['held_out']} more held out" if stats["held_out"] else ""
        text += f", {stats['skipped_short']} skipped (below {self._length} frames)" if stats["skipped_short"] else ""
        text += f", {stats['skipped_damaged']} skipped (damaged)" if stats["skipped_damaged"] else ""
        for stream in self._streams:
            text += f"{', ' if text else ''}a stream ({stream.source})"
        return f"{text}, from {'the host' if self._rows is None else self._rows.device}"

    @property
    def on_device(self) -> bool:
        """Whether batches come from a copy on the device; then reading ahead gains nothing."""
        if self._rows is not None and not self._places:
            self._copy_to_device()
        return self._rows is not None

    def sample(self, batch_size: int) -> dict[str, Tensor]:
        """Draw and read a batch, see :meth:`draw` and :meth:`read`."""
        return self.read(self.draw(batch_size))

    def draw(self, batch_size: int) -> SequenceIndices:
        """Choose the sequences of the next batch."""
        draw = self._train.draw(self._generator, batch_size)
        for index in range(len(self._streams)):
            self._streamed[index] += int((draw.source == len(self._corpora) + index).sum())
        return draw

    def read(self, draw: SequenceIndices, *, host: bool = False) -> dict[str, Tensor]:
        """The sequences of ``draw``. With streams, batches must be read in the order of their draws.

        Args:
            draw: from :meth:`draw`.
            host: read from the host even if there is a copy on a device.

        Returns:
            ``image`` uint8 ``[B, T, 64, 64, 3]`` and ``is_first`` bool ``[B, T]``, set on each first step only.
        """
        if not host and self.on_device:
            assert self._rows is not None
            places = [
                int(self._places[s][e]) + t for s, e, t in zip(draw.source, draw.episode, draw.start, strict=True)
            ]
            image = self._rows.gather(places, self._length)["image"]
        else:
            shape = (len(draw.source), self._length, *FRAME_SHAPE)
            image = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin_memory)
            for row, source, episode, start in zip(image.numpy(), draw.source, draw.episode, draw.start, strict=True):
                if source < len(self._corpora):
                    self._corpora[source].read_into(int(episode), int(start), row)
                else:
                    self._streams[source - len(self._corpora)].read_into(row)
        is_first = torch.zeros(image.shape[:2], dtype=torch.bool)
        is_first[:, 0] = True
        if self._pin_memory and image.device.type == "cpu":
            is_first = is_first.pin_memory()
        return {"image": image, "is_first": is_first.to(image.device)}

    def fixed(self, batch_size: int, count: int = 1, seed: int = FIXED_SEED) -> Iterator[dict[str, Tensor]]:
        """The same ``count`` batches at every call: of held-out episodes, or of all if none is held out.

        Streams take no part; there is nothing without other sources.
        """
        generator = np.random.default_rng(seed)
        for _ in range(count if self._shown.count else 0):
            yield self.read(self._shown.draw(generator, batch_size), host=True)

    @property
    def position(self) -> Position:
        """Where drawing stands now."""
        return Position(self._generator.bit_generator.state, tuple(self._streamed))

    def state_dict(self, position: Position | None = None) -> dict[str, Any]:
        """What a checkpoint needs beside the videos: where drawing stood, and the names of the episodes."""
        position = position or self.position
        return {
            "generator": json.dumps(position.generator),
            "streamed": list(position.streamed),
            "episodes": {corpus.source: list(corpus.names) for corpus in self._corpora},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a checkpoint: the same episodes, the same draws to come; a stream begins anew, in another order.

        Raises:
            EpisodeError: an episode of the checkpoint is missing or damaged.
        """
        for corpus, names in zip(self._corpora, state["episodes"].values(), strict=True):
            if names != corpus.names:
                corpus.select(names)
        self._generator.bit_generator.state = json.loads(state["generator"])
        self._streamed = list(state["streamed"])
        for stream, position in zip(self._streams, self._streamed, strict=True):
            warnings.warn(
                f"{stream.source} is a stream and cannot go on where it stopped: it begins anew, in another order",
                stacklevel=2,
            )
            stream.restart(position)
        self._places = []
        self._divide()

    def close(self) -> None:
        """Give back what the sources hold."""
        for corpus in self._corpora:
            corpus.close()
        for stream in self._streams:
            stream.close()

    def _divide(self) -> None:
        """Into episodes to train on and episodes held out, and how often each source is drawn from."""
        self._frames = [corpus.frames for corpus in self._corpora]
        usable = [np.flatnonzero(frames >= self._length) for frames in self._frames]
        for corpus, frames, one in zip(self._corpora, self._frames, usable, strict=True):
            if not len(one) and (self._weights is not None or not any(map(len, usable))):
                short = corpus.skipped_short + len(frames)
                problem = f"none is usable ({corpus.skipped_damaged} damaged, {short} with fewer than {self._length}"
                raise EpisodeError(corpus.source, "episodes", f"{problem} frames)")
        self._short = sum(corpus.skipped_short for corpus in self._corpora)
        self._short += sum(len(frames) - len(one) for frames, one in zip(self._frames, usable, strict=True))
        keys = [corpus.split_keys[one] for corpus, one in zip(self._corpora, usable, strict=True)]
        held = [one[out] for one, out in zip(usable, held_out(keys, self._validation), strict=True)]
        train = [np.setdiff1d(one, out) for one, out in zip(usable, held, strict=True)]
        weights = [1.0] if self._weights is None and self._streams else self._weights
        self._train = SequenceSampler(train, self._frames, weights, length=self._length, extra=self._extra)
        self._held_out = sum(map(len, held))
        only_corpora = None if weights is None else weights[: len(self._corpora)]
        shown = held if self._held_out else train
        self._shown = SequenceSampler(shown, self._frames, only_corpora, length=self._length)

    def _copy_to_device(self) -> None:
        """Copy the training videos, unless they do not fit."""
        assert self._rows is not None
        needed = self.stats["frames"] * int(np.prod(FRAME_SHAPE))
        if needed > self._rows.budget and not self._rows.strict:
            self._rows = None
            return
        self._places, place = [np.full(len(frames), -1) for frames in self._frames], 0
        for corpus, episodes, frames, places in zip(
            self._corpora, self._train.episodes, self._frames, self._places, strict=True
        ):
            for episode in episodes:
                places[episode] = place
                for start in range(0, frames[episode], _COPIED):
                    image = np.empty((min(_COPIED, frames[episode] - start), *FRAME_SHAPE), np.uint8)
                    corpus.read_into(int(episode), start, image)
                    if not self._rows.write(place, {"image": image}):
                        self._rows = None
                        return
                    place += len(image)

"""Which sequences make a batch: random choices alone, no frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SequenceIndices:
    """Source, episode in it and first frame of every sequence, int64 ``[B]``; a stream's episode is −1."""

    source: np.ndarray
    episode: np.ndarray
    start: np.ndarray


class SequenceSampler:
    """Draws a source by its weight, then an episode in it uniformly, then a start.

    Args:
        episodes: of every source, the numbers of those that may be drawn; a source without any is never drawn.
        frames: of every source, the lengths of all its episodes.
        weights: of the sources, and of streams behind them; None: the number of episodes.
        length: frames in a sequence.
        extra: weight of the last possible start beyond that of the others, which is 1.
    """

    def __init__(
        self,
        episodes: Sequence[np.ndarray],
        frames: Sequence[np.ndarray],
        weights: Sequence[float] | None,
        *,
        length: int,
        extra: int = 0,
    ) -> None:
        counts = [len(one) for one in episodes]
        weights = counts if weights is None else list(weights)
        streams = len(weights) - len(counts)
        self.episodes, self.count, self._extra = list(episodes), sum(counts), extra
        # A stream is a source of one episode with one start.
        self._counts = np.array([*counts, *[1] * streams])
        self._offsets = np.cumsum(self._counts) - self._counts
        self._episode = np.concatenate([*episodes, np.full(streams, -1)]).astype(np.int64)
        lasts = [all_frames[chosen] - length for all_frames, chosen in zip(frames, episodes, strict=True)]
        self._last = np.concatenate([*lasts, np.zeros(streams)]).astype(np.int64)
        used = np.where(self._counts > 0, weights, 0.0)
        self._cumulative = np.cumsum(used) / max(used.sum(), np.finfo(float).tiny)

    def draw(self, generator: np.random.Generator, batch_size: int) -> SequenceIndices:
        """Draw ``batch_size`` sequences; there must be something to draw."""
        source = np.searchsorted(self._cumulative, generator.random(batch_size), side="right")
        index = self._offsets[source] + generator.integers(self._counts[source])
        last = self._last[index]
        start = np.minimum(generator.integers(last + 1 + self._extra), last)
        return SequenceIndices(source, self._episode[index], start)

"""Which sequences make a batch: random choices alone, no frames. And which episodes are never trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Draw:
    """Source, episode in it and first frame of every sequence, int64 ``[B]``; a stream's episode is −1."""

    source: np.ndarray
    episode: np.ndarray
    start: np.ndarray


class Choice:
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
        given = counts if weights is None else list(weights)
        streams = len(given) - len(counts)
        self.episodes, self.count, self._extra = list(episodes), sum(counts), extra
        # A stream is a source of one episode with one start.
        self._counts = np.array([*counts, *[1] * streams])
        self._offsets = np.cumsum(self._counts) - self._counts
        self._episode = np.concatenate([*episodes, np.full(streams, -1)]).astype(np.int64)
        lasts = [all_frames[chosen] - length for all_frames, chosen in zip(frames, episodes, strict=True)]
        self._last = np.concatenate([*lasts, np.zeros(streams)]).astype(np.int64)
        used = np.where(self._counts > 0, given, 0.0)
        self._cumulative = np.cumsum(used) / max(used.sum(), np.finfo(float).tiny)

    def draw(self, generator: np.random.Generator, batch_size: int) -> Draw:
        """Draw ``batch_size`` sequences; there must be something to draw."""
        source = np.searchsorted(self._cumulative, generator.random(batch_size), side="right")
        index = self._offsets[source] + generator.integers(self._counts[source])
        last = self._last[index]
        return Draw(source, self._episode[index], np.minimum(generator.integers(last + 1 + self._extra), last))


def held_out(keys: Sequence[np.ndarray], share: float) -> list[np.ndarray]:
    """Numbers of the episodes of every source that are held out for validation, int64, ascending.

    An episode's key (:attr:`Corpus.split_keys`) decides alone whether it is held out, so those of one key stay
    together; but a source keeps at least one key, and at least one is held out (that of the smallest hash) if a source
    has two and ``share`` is not 0.
    """
    places = [np.array([_place(int(one)) for one in of_source]) for of_source in keys]
    held = [np.flatnonzero(one < min(share, one.max(initial=0.0))) for one in places]
    if share > 0 and not any(map(len, held)):
        smallest = [one.min() if len(np.unique(one)) > 1 else np.inf for one in places]
        source = int(np.argmin(smallest)) if smallest else 0
        if smallest and smallest[source] < np.inf:
            held[source] = np.flatnonzero(places[source] == smallest[source])
    return held


def _place(key: int) -> float:
    """Where a key is in [0, 1): evenly spread, always the same."""
    return int.from_bytes(hashlib.blake2b(key.to_bytes(8), digest_size=6).digest()) / 2**48

"""Which episodes are held out for validation: decided by their frames alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


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

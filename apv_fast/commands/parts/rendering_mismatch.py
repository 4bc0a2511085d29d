"""Warnings where videos and environments are rendered in different looks: a model of one sees little in the other."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path


def warn_of_mixture(qualities: Collection[str]) -> None:
    """``qualities`` are the looks of all videos together, as far as they are known."""
    if len(qualities) > 1:
        looks = " and ".join(sorted(qualities))
        warnings.warn(f"data: the videos are rendered in several looks, quality {looks}", stacklevel=2)


def warn_of_mismatch(pretrained: Path, qualities: Collection[str], quality: str) -> None:
    """``qualities`` are those of the videos that the model of ``pretrained`` has learnt from, if they are known."""
    others = sorted(set(qualities) - {quality})
    if others:
        warnings.warn(
            f"world.quality is {quality}, but {pretrained} has learnt from videos of quality {' and '.join(others)}; "
            f"its model transfers better with --world.quality {others[0]}",
            stacklevel=2,
        )

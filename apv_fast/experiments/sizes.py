"""How much of everything: the paper's figures, what a computer without a GPU can do in a day, and a test of the path.

The paper's figures are those of the presets ``metaworld`` and ``dmc``, which is why there is little to see here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Size = Literal["paper", "laptop", "quick"]
Flags = Mapping[str, str | int | float]  # option of a command without its dashes -> value


@dataclass(frozen=True)
class Scale:
    """How much of everything in one experiment."""

    seeds: tuple[int, ...]
    """Of the fine-tuning runs."""
    targets: int | None = None
    """How many of the tasks to learn; none is all of them."""
    video_tasks: int | None = None
    """How many tasks are shown in the videos; none is all of them."""
    videos: Flags = field(default_factory=dict)
    """Options of ``collect``."""
    agent: Flags = field(default_factory=dict)
    """Options of the run whose replay is taken as videos."""
    pretrain: Flags = field(default_factory=dict)
    """Options of ``pretrain``."""
    finetune: Flags = field(default_factory=dict)
    """Options of ``finetune``."""


PAPER_SEEDS = tuple(range(1, 9))

_SMALL_MODEL: Flags = {
    "model.deter": 200,
    "model.hidden": 200,
    "model.stoch": 16,
    "model.discrete": 16,
    "model.cnn-depth": 16,
}
_LAPTOP_PRETRAIN: Flags = {"steps": 10_000, "batch": 8, "length": 25, "video-every": 2000, **_SMALL_MODEL}
_LAPTOP: Flags = {
    "steps": 50_000,
    "batch": 8,
    "length": 25,
    "world.quality": "fast",
    "video-bonus.queue-size": 1024,
    "behavior.units": 200,
    "checkpoint-every": 2000,
    **_SMALL_MODEL,
}

_TINY_MODEL: Flags = {
    "model.deter": 16,
    "model.hidden": 16,
    "model.stoch": 4,
    "model.discrete": 4,
    "model.cnn-depth": 4,
}
_QUICK_PRETRAIN: Flags = {"steps": 6, "batch": 2, "length": 8, **_TINY_MODEL}
_QUICK: Flags = {
    "steps": 60,
    "prefill": 40,
    "first-updates": 2,
    "train-every": 20,
    "batch": 2,
    "length": 8,
    "world.quality": "fast",
    "world.time-limit": 40,
    "eval-every": 40,
    "eval-episodes": 1,
    "behavior.layers": 1,
    "behavior.units": 16,
    "behavior.horizon": 4,
    **_TINY_MODEL,
}
_QUICK_VIDEOS: Flags = {"episodes": 1, "world.quality": "fast", "world.time-limit": 20}

MANIPULATION: dict[Size, Scale] = {
    # 44 tasks × 22 demonstrations × 5 cameras = 4840 videos; the paper has 99 × 10 × 5 = 4950, of RLBench.
    "paper": Scale(PAPER_SEEDS, videos={"episodes": 22}),
    "laptop": Scale(
        (1, 2, 3),
        video_tasks=10,
        videos={"episodes": 5, "world.quality": "fast"},
        pretrain=_LAPTOP_PRETRAIN,
        finetune={**_LAPTOP, "eval-every": 5000},
    ),
    "quick": Scale((1,), 1, 2, videos=_QUICK_VIDEOS, pretrain=_QUICK_PRETRAIN, finetune=_QUICK),
}

LOCOMOTION: dict[Size, Scale] = {
    "paper": Scale(PAPER_SEEDS, videos={"episodes": 22}),
    "laptop": Scale(
        (1, 2, 3),
        video_tasks=10,
        videos={"episodes": 5, "world.quality": "fast"},
        agent={**_LAPTOP, "eval-every": 10_000, "eval-episodes": 1},
        pretrain=_LAPTOP_PRETRAIN,
        finetune={**_LAPTOP, "eval-every": 5000, "eval-episodes": 3},
    ),
    "quick": Scale((1,), 1, 2, videos=_QUICK_VIDEOS, agent=_QUICK, pretrain=_QUICK_PRETRAIN, finetune=_QUICK),
}

_WALKER_MODEL: Flags = {
    "model.deter": 128,
    "model.hidden": 128,
    "model.stoch": 12,
    "model.discrete": 12,
    "model.cnn-depth": 8,
    "batch": 16,
    "length": 16,
    "optimizer.lr": 1e-3,
}

WALKER: dict[Size, Scale] = {
    # Learning rates above the paper's, since there is time for a few thousand updates only.
    "laptop": Scale(
        (1, 2, 3),
        videos={"episodes": 40, "world.action-repeat": 4},
        pretrain={"steps": 3000, "video-every": 1000, **_WALKER_MODEL},
        finetune={
            "steps": 8000,
            "prefill": 1000,
            "train-every": 4,
            "eval-every": 1000,
            "eval-episodes": 3,
            "log-every": 500,
            "video-every": 4000,
            "world.action-repeat": 4,
            "behavior.units": 128,
            "behavior.horizon": 10,
            "behavior.slow-every": 30,
            "behavior.optimizer.lr": 5e-4,
            **_WALKER_MODEL,
        },
    ),
    "quick": Scale((1,), videos=_QUICK_VIDEOS, pretrain=_QUICK_PRETRAIN, finetune=_QUICK),
}

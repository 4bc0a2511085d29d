"""Small runs of all commands, and what decides how a run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from apv_fast.cli import main
from apv_fast.run import latest_checkpoint, load_checkpoint, read_metrics

EPISODE = 15  # actions in an episode of WORLD

WORLD = "--world.action-repeat 20 --world.time-limit 300 --world.quality fast"

MODEL = "--model.deter 8 --model.hidden 8 --model.stoch 3 --model.discrete 4 --model.cnn-depth 2"

SMALL = f"{MODEL} --batch 2 --length 8 --device cpu"

# Checkpoints fall into the middle of episodes, and of the means between two lines of metrics.
PRETRAIN = f"{SMALL} --log-every 4 --checkpoint-every 3 --video-every 6 --validate-every 5"

FINETUNE = (
    f"--env dmc:cartpole-swingup --prefill {EPISODE} --first-updates 2 {SMALL} {WORLD} --behavior.units 8 "
    "--behavior.horizon 3 --log-every 10 --checkpoint-every 7 --video-every 20 --eval-every 20 --eval-episodes 1"
)


def apv(command: str) -> None:
    """Run a command that must succeed."""
    assert main(command.split()) == 0, command


def state_of(run: Path) -> dict[str, Any]:
    """The state in a run's newest checkpoint."""
    path = latest_checkpoint(run / "checkpoints")
    assert path is not None
    return load_checkpoint(path)[1]


def differences(one: Any, other: Any, name: str = "state") -> list[str]:
    """Where two nested states differ in any bit."""
    if isinstance(one, Mapping):
        assert one.keys() == other.keys(), name
        return [line for key in one for line in differences(one[key], other[key], f"{name}.{key}")]
    if isinstance(one, list):
        assert len(one) == len(other), name
        return [
            line for i, pair in enumerate(zip(one, other, strict=True)) for line in differences(*pair, f"{name}.{i}")
        ]
    same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [] if same else [name]


def learnt(run: Path) -> dict[str, Any]:
    """Everything that decides how a run goes on; the names of episode files have the time in them."""
    state = state_of(run)
    if "videos" in state:
        numbers = [len(names) for names in state["videos"]["episodes"].values()]
        return state | {"videos": state["videos"] | {"episodes": numbers}}
    return state | {"replay": state["replay"] | {"episodes": len(state["replay"]["episodes"])}}


def metrics_of(run: Path) -> list[dict[str, float]]:
    """The lines of metrics without what the clock decides."""
    lines = read_metrics(run / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in ("time", "data_wait")} for line in lines]

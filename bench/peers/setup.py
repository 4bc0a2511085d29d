"""What every driver is given and what it gives back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

UPDATES = ("pretrain_update", "finetune_update")
DTYPES = ("bfloat16", "tf32", "float32", "float16")  # of the products; float16 with the peer's own loss scale
STOCH = DISCRETE = 32  # latents, on all sides
WARM_UP = {"cpu": 1, "cuda": 10}  # updates before the first that is timed: cuDNN's search, compilation, loss scales


class PeerError(RuntimeError):
    """A peer cannot be timed, and why; or it ran and did not train."""


@dataclass(frozen=True)
class Setup:
    """One update at one size."""

    op: str  # of UPDATES
    batch: int = 16
    length: int = 25
    deter: int = 1024
    hidden: int = 1024
    cnn_depth: int = 48
    horizon: int = 15  # imagined steps; pre-training has none
    actions: int = 4
    dtype: str = "float32"  # of DTYPES
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0
    options: Mapping[str, str] = field(default_factory=dict)  # of the peer's own

    def __post_init__(self) -> None:
        if self.op not in UPDATES:
            raise PeerError(f"update is {self.op!r}; it must be one of {', '.join(UPDATES)}")
        if self.dtype not in DTYPES:
            raise PeerError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
        if self.dtype in ("tf32", "float16") and self.device.type != "cuda":
            raise PeerError(f"dtype is {self.dtype}; that needs --device cuda")
        for name in ("batch", "length", "deter", "hidden", "cnn_depth", "horizon", "actions"):
            if getattr(self, name) < 1:
                raise PeerError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def shape(self) -> dict[str, int]:
        """As in the rows of our own updates."""
        sizes = {"B": self.batch, "T": self.length, "deter": self.deter, "hidden": self.hidden}
        sizes["cnn_depth"] = self.cnn_depth
        return sizes if self.op == "pretrain_update" else sizes | {"horizon": self.horizon}

    def option(self, name: str, allowed: tuple[str, ...]) -> str:
        """A setting of the peer's own; the first allowed value unless it was set.

        Raises:
            PeerError: it was set to another value.
        """
        value = self.options.get(name, allowed[0])
        if value not in allowed:
            raise PeerError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
        return value

    def only(self, *names: str) -> None:
        """Refuse options of other names.

        Raises:
            PeerError: one was given.
        """
        if unknown := sorted(set(self.options) - set(names)):
            raise PeerError(f"unknown option {unknown[0]!r}; this peer has {', '.join(names) or 'none'}")


@dataclass(frozen=True)
class Peer:
    """A learner that is ready to be timed."""

    name: str  # of the contestant
    update: Callable[[], Mapping[str, object]]  # does one update; its losses by name
    weights: list[nn.Parameter]  # all that it trains
    differs: tuple[str, ...]  # what is not as in our update
    version: str  # of the checkout or the wheel

    def warm_up(self, count: int) -> dict[str, float]:
        """Update ``count`` times and see that it is training.

        Returns:
            The losses of the last update.

        Raises:
            PeerError: a loss is not finite, there is none, or no weight has changed.
        """
        before = [weight.detach().clone() for weight in self.weights]
        losses: Mapping[str, object] = {}
        for _ in range(count):
            losses = self.update()
        values = {name: float(value) for name, value in losses.items() if isinstance(value, float | int | Tensor)}
        if not values:
            raise PeerError(f"{self.name}: an update reports no loss")
        for name, value in values.items():
            if not math.isfinite(value):
                raise PeerError(f"{self.name}: {name} is {value} after {count} updates; a rival must train")
        if not any(not torch.equal(now, then) for now, then in zip(self.weights, before, strict=True)):
            raise PeerError(f"{self.name}: {count} updates have changed no weight")
        return values

    @property
    def parameters(self) -> int:
        """How many numbers it trains."""
        return sum(weight.numel() for weight in self.weights)


Make = Callable[[Setup, Path], Peer]


def trained(weights: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Each weight that takes gradients once."""
    return list({id(weight): weight for weight in weights if weight.requires_grad}.values())

"""Multilayer perceptrons on features: reward, discount, actor, critic (DreamerV2, Hafner et al. 2021)."""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import Tensor, distributions, nn

from apv_fast.mixed_precision import cast_layers
from apv_fast.nn.init import dense, keras_init
from apv_fast.nn.saving import Savable
from apv_fast.ops.mlp import mlp
from apv_fast.reference.distributions import ActionDistribution, OneHot, TruncatedNormal
from apv_fast.types import ActorParams


class Trunk(nn.Module):
    """``layers`` dense layers of ``units`` with ELU; ``[..., F] → [..., units]``."""

    def __init__(self, feat_dim: int, layers: int, units: int, dtype: torch.dtype, backend: str) -> None:
        super().__init__()
        widths = [feat_dim] + [units] * layers
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in itertools.pairwise(widths))
        self.dtype, self.backend = dtype, backend

    def forward(self, x: Tensor) -> Tensor:
        """Features of the last layer."""
        layers = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        if not layers:
            return x.to(self.dtype)
        if x.shape[-1] != layers[0].in_features:
            raise ValueError(
                f"the features have shape {tuple(x.shape)}; their last size must be {layers[0].in_features}"
            )
        weights = cast_layers(layers, self.dtype)
        return mlp(x, list(zip(weights[::2], weights[1::2], strict=True)), backend=self.backend)


class MLPHead(Savable):
    """A scalar's distribution from features: ``[..., F] → distribution over [...]``.

    Args:
        feat_dim: width of the features.
        layers: number of hidden layers.
        units: their width.
        dist: "normal" for N(out, 1), "bernoulli" for Bernoulli(sigmoid(out)), which takes soft targets in [0, 1].
        dtype: of the products; the weights stay float32.
        backend: see :mod:`apv_fast.backend`.
    """

    def __init__(
        self,
        feat_dim: int,
        *,
        layers: int = 4,
        units: int = 400,
        dist: Literal["normal", "bernoulli"] = "normal",
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if dist not in ("normal", "bernoulli"):
            raise ValueError(f"MLPHead: dist is {dist!r}; it must be 'normal' or 'bernoulli'")
        self.trunk = Trunk(feat_dim, layers, units, dtype, backend)
        self.out = nn.Linear(units, 1)
        self.dist, self.dtype = dist, dtype
        keras_init(self)

    def forward(self, feat: Tensor) -> distributions.Distribution:
        """The distribution, in float32 at least; its checks are off since they would stop a GPU."""
        out = dense(self.out, self.trunk(feat), self.dtype).squeeze(-1)
        out = out.to(torch.promote_types(self.dtype, torch.float32))
        if self.dist == "bernoulli":
            return distributions.Bernoulli(logits=out, validate_args=False)
        # Not 1.0: a number would be copied to a GPU, for which the host waits.
        return distributions.Normal(out, torch.ones_like(out), validate_args=False)


class Critic(MLPHead):
    """The value of a state: N(out, 1)."""

    def __init__(
        self,
        feat_dim: int,
        *,
        layers: int = 4,
        units: int = 400,
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ) -> None:
        super().__init__(feat_dim, layers=layers, units=units, dist="normal", dtype=dtype, backend=backend)


class Actor(Savable):
    """The policy: ``[..., F] →`` a truncated normal on [−1, 1], or a one-hot categorical, over ``[..., A]``.

    Args:
        feat_dim: width of the features.
        action_dim: A.
        discrete: one-hot actions.
        layers: number of hidden layers.
        units: their width.
        min_std: least scale of the truncated normal.
        dtype: of the products; the weights stay float32.
        backend: see :mod:`apv_fast.backend`.
    """

    def __init__(
        self,
        feat_dim: int,
        action_dim: int,
        *,
        discrete: bool = False,
        layers: int = 4,
        units: int = 400,
        min_std: float = 0.1,
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if action_dim < 1:
            raise ValueError(f"Actor: action_dim is {action_dim}; it must be at least 1")
        self.trunk = Trunk(feat_dim, layers, units, dtype, backend)
        self.out = nn.Linear(units, action_dim)
        self.std = None if discrete else nn.Linear(units, action_dim)
        self.min_std, self.dtype = min_std, dtype
        keras_init(self)

    def params(self) -> ActorParams:
        """The weights as the ops take them, in the dtype of the products."""
        heads = [layer for layer in (self.out, self.std) if layer is not None]
        layers = [*self.trunk.layers, *heads]
        return ActorParams.of(cast_layers(layers, self.dtype), discrete=self.std is None)

    def forward(self, feat: Tensor) -> ActionDistribution:
        """The distribution of actions, in float32 at least."""
        x = self.trunk(feat)
        precise = torch.promote_types(self.dtype, torch.float32)
        out = dense(self.out, x, self.dtype).to(precise)
        if self.std is None:
            return OneHot(out)
        std = dense(self.std, x, self.dtype).to(precise)
        return TruncatedNormal(torch.tanh(out), 2 * torch.sigmoid(std / 2) + self.min_std)

"""The flat structures that the RSSM ops take: weights, the kind of latent, states."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Of posterior and prior alike, of each, or to be drawn. A tensor is the noise itself or, as an int64 scalar, a seed.
Noise = Tensor | tuple[Tensor, Tensor] | None
NoisePair = tuple[Tensor | None, Tensor | None]  # of the posterior and the prior: numbers, a seed, or None for modes
State = dict[str, Tensor]  # deter [..., D]; stoch [..., S, C] with logit, or stoch [..., S] with mean and std


class RSSMParams(NamedTuple):
    """The weights of one RSSM as the ops take them: a flat tuple in this order, PyTorch's layout ``[out, in]``.

    L = S*C for categorical latents and S for Gaussian ones; M = S*C, or 2*S (mean, then std) for Gaussian ones.
    P = width that actions are padded to. The gates' rows are reset, candidate, update.
    """

    img_in_weight: Tensor  # [H, L + P]   columns: stoch, then action
    img_in_bias: Tensor  # [H]
    gru_weight: Tensor  # [3*D, H + D]    columns: input, then deter
    gru_bias: Tensor  # [3*D]
    gru_norm_weight: Tensor  # [3*D]
    gru_norm_bias: Tensor  # [3*D]
    img_out_weight: Tensor  # [H, D]
    img_out_bias: Tensor  # [H]
    img_dist_weight: Tensor  # [M, H]
    img_dist_bias: Tensor  # [M]
    obs_out_weight: Tensor  # [H, D + E]  columns: deter, then embed
    obs_out_bias: Tensor  # [H]
    obs_dist_weight: Tensor  # [M, H]
    obs_dist_bias: Tensor  # [M]


class ActorParams(NamedTuple):
    """The weights of one actor as the ops take them, PyTorch's layout ``[out, in]``; ELU behind each hidden layer.

    U = units of a hidden layer; the first one sees features, ``stoch`` (flat) and then ``deter``: L + D wide.
    """

    trunk: tuple[Tensor, ...]  # weight [U, L + D] or [U, U] and bias [U] of each hidden layer in turn
    out_weight: Tensor  # [A, U]          the truncated normal's loc before tanh, or the one-hot's logits
    out_bias: Tensor  # [A]
    std_weight: Tensor | None  # [A, U]   the truncated normal's scale before sigmoid; None: one-hot actions
    std_bias: Tensor | None  # [A]

    @property
    def discrete(self) -> bool:
        """Whether actions are one-hot."""
        return self.std_weight is None

    def flat(self) -> list[Tensor]:
        """All tensors in one list, which :meth:`of` takes apart."""
        return [*self.trunk, *(x for x in self[1:] if isinstance(x, Tensor))]

    @classmethod
    def of(cls, tensors: list[Tensor], discrete: bool) -> ActorParams:
        """From the list that :meth:`flat` makes."""
        heads = 2 if discrete else 4
        trunk, rest = tuple(tensors[:-heads]), tensors[-heads:]
        return cls(trunk, rest[0], rest[1], None, None) if discrete else cls(trunk, *rest)


class Latent(NamedTuple):
    """What kind of latent an RSSM has; plain numbers, so that it passes through ``torch.library``."""

    stoch: int  # S
    discrete: int  # C, or 0 for Gaussian latents
    min_std: float = 0.1  # Gaussian only

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the distribution's parameters in a state."""
        return ("logit",) if self.discrete else ("mean", "std")


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and statistics for weights of ``dtype``: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def state_of(deter: Tensor, stoch: Tensor, stats: Tensor, latent: Latent) -> State:
    """A state with DreamerV2's keys, of flat latents ``[..., L]`` and a distribution layer's output ``[..., M]``.

    Views of them, except for Gaussian std.
    """
    if latent.discrete:
        shape = (latent.stoch, latent.discrete)
        return {"deter": deter, "stoch": stoch.unflatten(-1, shape), "logit": stats.unflatten(-1, shape)}
    mean, raw = stats.chunk(2, -1)
    return {"deter": deter, "stoch": stoch, "mean": mean, "std": 2 * torch.sigmoid(raw / 2) + latent.min_std}

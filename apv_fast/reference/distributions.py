"""The actors' distributions, with every random choice open to being fixed by given noise."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from apv_fast.reference.rssm_step import onehot_straight_through

CLIP = 1e-6  # samples stay this far inside the bounds, where log-probabilities are finite


def normal_log_prob(x: Tensor, mean: Tensor) -> Tensor:
    """``log N(x | mean, 1)``, element by element, the constant included."""
    return -0.5 * (x - mean).square() - 0.5 * math.log(2 * math.pi)


class TruncatedNormal:
    """Independent normals truncated to [−1, 1], ``[..., A]``."""

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self.loc, self.scale = loc, scale
        self._low, self._high = (-1 - loc) / scale, (1 - loc) / scale
        self._cdf_low = torch.special.ndtr(self._low)
        self._mass = torch.special.ndtr(self._high) - self._cdf_low

    @property
    def mode(self) -> Tensor:
        """The most likely action, ``[..., A]``: loc, which tanh keeps inside the bounds."""
        return self.loc.clamp(-1, 1)

    def rsample(self, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Samples by inverse CDF of uniforms ``noise [..., A]``; clipped with a straight-through gradient."""
        if noise is None:
            noise = torch.empty_like(self.loc).uniform_(generator=generator)
        limits = torch.finfo(self.loc.dtype)
        cdf = self._cdf_low + noise * self._mass
        # Where rounding takes the CDF to 0 or 1 its inverse is infinite; the sample is clipped there anyway.
        cdf = cdf + (cdf.clamp(limits.tiny, 1 - limits.eps / 2) - cdf).detach()
        x = self.loc + self.scale * torch.special.ndtri(cdf)
        return x + (x.clamp(-1 + CLIP, 1 - CLIP) - x).detach()

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-density of ``action [..., A]``, summed over A; ``[...]``."""
        return (
            normal_log_prob((action - self.loc) / self.scale, torch.zeros_like(self.loc))
            - self.scale.log()
            - self._mass.log()
        ).sum(-1)

    def entropy(self) -> Tensor:
        """Differential entropy in nats, summed over A; ``[...]``."""
        density_low = normal_log_prob(self._low, torch.zeros_like(self._low)).exp()
        density_high = normal_log_prob(self._high, torch.zeros_like(self._high)).exp()
        tails = (self._low * density_low - self._high * density_high) / (2 * self._mass)
        return (0.5 * math.log(2 * math.pi * math.e) + (self.scale * self._mass).log() + tails).sum(-1)


class OneHot:
    """A categorical over one-hot actions ``[..., A]``, sampled with a straight-through gradient."""

    def __init__(self, logit: Tensor) -> None:
        self.logit = logit

    @property
    def mode(self) -> Tensor:
        """The most likely action, one-hot ``[..., A]``."""
        return F.one_hot(self.logit.argmax(-1), self.logit.shape[-1]).to(self.logit.dtype)

    def rsample(self, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Samples ``onehot(argmax(logit + noise))`` for Gumbel ``noise [..., A]``."""
        if noise is None:
            noise = -torch.empty_like(self.logit).exponential_(generator=generator).log()
        return onehot_straight_through(self.logit, noise)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probability ``[...]`` of one-hot ``action [..., A]``; none of its gradient goes to the action."""
        return (action.detach() * self.logit.log_softmax(-1)).sum(-1)

    def entropy(self) -> Tensor:
        """Entropy in nats, ``[...]``."""
        log_probs = self.logit.log_softmax(-1)
        return -(log_probs.exp() * log_probs).sum(-1)


ActionDistribution = TruncatedNormal | OneHot

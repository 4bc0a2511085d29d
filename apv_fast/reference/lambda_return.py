"""The λ-return of DreamerV2 (Hafner et al. 2021, equation 4)."""

from __future__ import annotations

import torch
from torch import Tensor


def lambda_return(reward: Tensor, value: Tensor, discount: Tensor, bootstrap: Tensor, lambda_: float) -> Tensor:
    """``G_t = r_t + γ_t((1 − λ)v_{t+1} + λG_{t+1})``, ending in ``bootstrap [N]``; all else ``[H, N]``."""
    dtype = torch.promote_types(reward.dtype, torch.float32)
    following = torch.cat([value[1:], bootstrap[None]]).to(dtype)
    target = reward.to(dtype) + discount.to(dtype) * (1 - lambda_) * following
    returns, last = [], bootstrap.to(dtype)
    for t in reversed(range(len(reward))):
        last = target[t] + discount[t].to(dtype) * lambda_ * last
        returns.append(last)
    return torch.stack(returns[::-1]).to(reward.dtype)

"""Imagination with the actor in the loop, one step at a time (Hafner et al. 2021, section 2.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apv_fast.reference.distributions import TruncatedNormal
from apv_fast.reference.noise import gumbel_noise, uniform_noise, whole_noise
from apv_fast.reference.rssm_step import dense, feat, img_step, onehot_straight_through
from apv_fast.types import ActorParams, Latent, RSSMParams, State


def act(actor: ActorParams, features: Tensor, min_std: float, noise: Tensor) -> Tensor:
    """Actions ``[N, A]`` for features ``[N, L + D]``, the randomness given."""
    x = features.to(actor.out_weight.dtype)
    for weight, bias in zip(actor.trunk[::2], actor.trunk[1::2], strict=True):
        x = F.elu(F.linear(x, weight, bias))
    out = dense(x, actor.out_weight, actor.out_bias)
    if actor.std_weight is None or actor.std_bias is None:
        return onehot_straight_through(out, noise)
    std = dense(x, actor.std_weight, actor.std_bias)
    return TruncatedNormal(torch.tanh(out), 2 * torch.sigmoid(std / 2) + min_std).rsample(noise)


def rssm_rollout(
    params: RSSMParams,
    actor: ActorParams,
    state: State,  # deter [N, D], stoch [N, S, C] or [N, S]
    horizon: int,
    latent: Latent,
    min_std: float,
    noise: Tensor,  # [H, N, S, C] or [H, N, S], or a seed
    action_noise: Tensor,  # [H, N, A]: uniforms, or Gumbel for one-hot actions; or a seed
) -> tuple[State, Tensor]:
    """``horizon`` steps of the prior, each after an action for the state before it; ``[H, N, ...]`` each."""
    leading, dtype = (horizon, len(state["deter"])), state["deter"].dtype
    if not action_noise.is_floating_point():
        make = gumbel_noise if actor.discrete else uniform_noise
        action_noise = make(action_noise, *leading, len(actor.out_bias)).to(dtype)
    whole = whole_noise(noise, leading, latent, dtype)
    assert whole is not None
    states, actions = [], []
    for t in range(horizon):
        action = act(actor, feat(state).detach(), min_std, action_noise[t])
        state = img_step(params, state, action, latent, whole[t])
        states.append(state)
        actions.append(action)
    return {key: torch.stack([each[key] for each in states]) for key in states[0]}, torch.stack(actions)

"""The recurrent state-space model, one step at a time (Hafner et al. 2019; APV's variant: Seo et al. 2022, section 3).

Shapes: B batch, T time, S variables, C classes each (C = 0: Gaussian latents), D deter, H hidden, E embedding.
Dense layers run in the dtype of the weights; LayerNorm, gates, softmax and states in float32, or float64 if they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apv_fast.reference.noise import whole_noise
from apv_fast.types import Latent, RSSMParams, State, state_dtype

LAYER_NORM_EPS = 1e-3  # Keras' default, not PyTorch's
UPDATE_BIAS = -1.0  # keeps the update gate nearly shut at first: the GRU starts by remembering


def feat(state: State) -> Tensor:
    """What heads read: ``concat(flatten(stoch), deter)``, ``[..., L + D]``."""
    deter = state["deter"]
    return torch.cat([state["stoch"].flatten(deter.dim() - 1), deter], -1)


def dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A Keras Dense layer in the weights' dtype; the result in the states' dtype."""
    return F.linear(x.to(weight.dtype), weight, bias).to(state_dtype(weight.dtype))


def onehot_straight_through(logit: Tensor, noise: Tensor) -> Tensor:
    """One-hot samples ``argmax(logit + noise)`` whose gradient is that of ``softmax(logit)``; ``[..., C]``."""
    sample = F.one_hot((logit + noise).argmax(-1), logit.shape[-1]).to(logit.dtype)
    probs = logit.softmax(-1)
    return sample + (probs - probs.detach())  # in this order the value stays exactly one-hot


def latent_state(out: Tensor, latent: Latent, noise: Tensor | None) -> State:
    """Statistics and stoch from a distribution layer's output ``[..., M]``; the mode if ``noise`` is None."""
    if latent.discrete:
        logit = out.unflatten(-1, (latent.stoch, latent.discrete))
        if noise is None:  # a mode has no straight-through gradient
            stoch = F.one_hot(logit.argmax(-1), latent.discrete).to(logit.dtype)
        else:
            stoch = onehot_straight_through(logit, noise)
        return {"stoch": stoch, "logit": logit}
    mean, std = out.chunk(2, -1)
    std = 2 * torch.sigmoid(std / 2) + latent.min_std
    return {"stoch": mean if noise is None else mean + std * noise, "mean": mean, "std": std}


def gru(params: RSSMParams, x: Tensor, deter: Tensor) -> Tensor:
    """One step of the GRU with LayerNorm over all three gates together; ``[B, D]``."""
    parts = dense(torch.cat([x, deter], -1), params.gru_weight, params.gru_bias)
    scale, offset = params.gru_norm_weight.to(parts.dtype), params.gru_norm_bias.to(parts.dtype)
    parts = F.layer_norm(parts, parts.shape[-1:], scale, offset, LAYER_NORM_EPS)
    reset, candidate, update = parts.chunk(3, -1)
    candidate = torch.tanh(torch.sigmoid(reset) * candidate)
    update = torch.sigmoid(update + UPDATE_BIAS)
    return update * candidate + (1 - update) * deter


def img_step(params: RSSMParams, state: State, action: Tensor | None, latent: Latent, noise: Tensor | None) -> State:
    """The prior: one step of dynamics without looking."""
    stoch = state["stoch"].flatten(1)
    pad = params.img_in_weight.shape[1] - stoch.shape[1]
    action = stoch.new_zeros(len(stoch), 0) if action is None else action.to(stoch.dtype)
    x = torch.cat([stoch, F.pad(action, (0, pad - action.shape[1]))], -1)
    x = F.elu(dense(x, params.img_in_weight, params.img_in_bias))
    deter = gru(params, x, state["deter"])
    x = F.elu(dense(deter, params.img_out_weight, params.img_out_bias))
    return {"deter": deter, **latent_state(dense(x, params.img_dist_weight, params.img_dist_bias), latent, noise)}


def obs_step(
    params: RSSMParams,
    state: State,
    action: Tensor | None,
    embed: Tensor,
    is_first: Tensor,
    latent: Latent,
    post_noise: Tensor | None,
    prior_noise: Tensor | None,
) -> tuple[State, State]:
    """The posterior: one step with an observation. Where ``is_first``, state and action start from zeros."""
    keep = ~is_first
    # Not a product: 0·NaN is NaN, and what came before is forgotten.
    state = {key: torch.where(keep.view(-1, *[1] * (x.dim() - 1)), x, 0) for key, x in state.items()}
    action = None if action is None else torch.where(keep[:, None], action, 0)
    prior = img_step(params, state, action, latent, prior_noise)
    x = torch.cat([prior["deter"], embed.to(prior["deter"].dtype)], -1)
    x = F.elu(dense(x, params.obs_out_weight, params.obs_out_bias))
    out = dense(x, params.obs_dist_weight, params.obs_dist_bias)
    return {"deter": prior["deter"], **latent_state(out, latent, post_noise)}, prior


def at(x: Tensor | None, t: int) -> Tensor | None:
    """Of a sequence ``[B, T, ...]``, step t."""
    return None if x is None else x[:, t]


def stack(steps: list[State]) -> State:
    """Steps ``[B, ...]`` as a sequence ``[B, T, ...]``."""
    return {key: torch.stack([step[key] for step in steps], 1) for key in steps[0]}


def rssm_step(
    params: RSSMParams,
    state: State,
    action: Tensor | None,
    embed: Tensor | None,
    is_first: Tensor | None,
    latent: Latent,
    post_noise: Tensor | None,
    prior_noise: Tensor | None,
) -> tuple[State, State]:
    """One step: posterior and prior with an ``embed``, the prior twice without one."""
    leading, dtype = (len(state["deter"]),), state["deter"].dtype
    post_noise, prior_noise = (whole_noise(noise, leading, latent, dtype) for noise in (post_noise, prior_noise))
    if embed is None or is_first is None:
        prior = img_step(params, state, action, latent, prior_noise)
        return prior, prior
    return obs_step(params, state, action, embed, is_first, latent, post_noise, prior_noise)

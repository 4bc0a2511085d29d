"""The rival that a competent user of ``torch.compile`` would write: the posterior scan with all hoisted that can be.

The embedding's, action's and prior's products run once over B·T; a Python loop calls one compiled function a step; the
whole, with autograd's backward, is recorded as a CUDA graph by whoever times it. Weights in the products' dtype, noise
made beforehand. (Compiling all T steps as one function takes minutes: 190 s measured by the project on two CPU cores.)
:mod:`bench.rivals.scanned` has the same around PyTorch's own scan.

Limits: categorical latents, samples (no modes), and a start from zeros.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from apv_fast.reference.rssm_step import dense, gru, onehot_straight_through
from apv_fast.types import Latent, RSSMParams, state_dtype

# (params, x_t, obs_t, keep_t, deter, stoch, noise_t) -> deter, stoch, logit
Step = Callable[[RSSMParams, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def step(
    params: RSSMParams,
    x: Tensor,  # [B, H] img_in's bias and action part
    obs: Tensor,  # [B, H] obs_out's bias and embedding part
    keep: Tensor,  # [B, 1] bool
    deter: Tensor,  # [B, D]
    stoch: Tensor,  # [B, S, C]
    noise: Tensor,  # [B, S, C]
) -> tuple[Tensor, Tensor, Tensor]:
    """One posterior step: deter ``[B, D]``, stoch and logit ``[B, S, C]``."""
    dtype, width = params.gru_weight.dtype, stoch[0].numel()
    deter, flat = deter * keep, (stoch.flatten(1) * keep).to(dtype)
    x = F.elu((x + flat @ params.img_in_weight[:, :width].T).to(deter.dtype))
    deter = gru(params, x, deter)
    y = F.elu((obs + deter.to(dtype) @ params.obs_out_weight[:, : deter.shape[1]].T).to(deter.dtype))
    logit = dense(y, params.obs_dist_weight, params.obs_dist_bias).unflatten(-1, stoch.shape[1:])
    return deter, onehot_straight_through(logit, noise), logit


def before(
    params: RSSMParams, embed: Tensor, is_first: Tensor, action: Tensor | None, latent: Latent
) -> tuple[Tensor, Tensor, Tensor]:
    """What of every step does not wait for the step before: ``x`` and ``obs [B, T, H]``, ``keep [B, T, 1]``."""
    dtype, width = params.gru_weight.dtype, latent.stoch * latent.discrete
    keep = ~is_first[..., None]
    if action is None:
        x = params.img_in_bias.expand(*embed.shape[:2], -1)
    else:
        columns = params.img_in_weight[:, width : width + action.shape[-1]]
        x = F.linear((action * keep).to(dtype), columns, params.img_in_bias)
    obs = F.linear(embed.to(dtype), params.obs_out_weight[:, params.img_out_weight.shape[1] :], params.obs_out_bias)
    return x, obs, keep


def zeros(params: RSSMParams, latent: Latent, batch: int) -> tuple[Tensor, Tensor]:
    """The state before the first step; where gradients are on it needs one, since later states do.

    Else a loop's first step would compile on its own, and a scan's carry would change its kind.
    """
    grad, wide, device = torch.is_grad_enabled(), state_dtype(params.gru_weight.dtype), params.gru_weight.device
    deter = torch.zeros(batch, params.img_out_weight.shape[1], dtype=wide, device=device, requires_grad=grad)
    shape = (batch, latent.stoch, latent.discrete)
    return deter, torch.zeros(shape, dtype=wide, device=device, requires_grad=grad)


def prior(params: RSSMParams, deters: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The prior's stoch and logit ``[B, T, S, C]`` of all steps."""
    hidden = F.elu(dense(deters, params.img_out_weight, params.img_out_bias))
    logit = dense(hidden, params.img_dist_weight, params.img_dist_bias).unflatten(-1, noise.shape[2:])
    return onehot_straight_through(logit, noise), logit


def observe(
    step: Step,
    params: RSSMParams,
    embed: Tensor,  # [B, T, E]
    is_first: Tensor,  # [B, T]
    action: Tensor | None,  # [B, T, A]
    latent: Latent,
    noise: Tensor,  # [B, T, S, C]
    prior_noise: Tensor,
) -> list[Tensor]:
    """``rssm_observe`` from zeros: deter, stoch, logit, prior's stoch and logit, ``[B, T, ...]``."""
    x, obs, keep = before(params, embed, is_first, action, latent)
    deter, stoch = zeros(params, latent, len(embed))
    steps = []
    for t in range(embed.shape[1]):
        deter, stoch, logit = step(params, x[:, t], obs[:, t], keep[:, t], deter, stoch, noise[:, t])
        steps.append((deter, stoch, logit))
    deters, stochs, logits = (torch.stack(rows, 1) for rows in zip(*steps, strict=True))
    return [deters, stochs, logits, *prior(params, deters, prior_noise)]

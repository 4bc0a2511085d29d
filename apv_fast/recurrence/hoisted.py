"""What surrounds the recurrence of one RSSM: products over all B·T, before it, after it, and for the gradients.

Before: the embedding's part of obs_out and the action's part of img_in. After: the prior's head. Backward, the other
way round: the prior's head, the reverse recurrence, then one product for the gradient of every weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from apv_fast.ops.rssm_observe import RssmObserve
from apv_fast.recurrence.phases import (
    Before,
    ScanBackend,
    ScanGrads,
    ScanInputs,
    ScanStart,
    Seen,
    Trace,
    TraceGrads,
    add,
    empty_trace,
    scan_weights,
)
from apv_fast.types import Latent, RSSMParams, State, state_of


def start_of(call: RssmObserve) -> ScanStart:
    """Where the recurrence starts."""
    return ScanStart(~call.is_first, call.state["deter"].contiguous(), call.post_noise)


class PriorTrace(NamedTuple):
    """The prior's head after the recurrence."""

    stoch: Tensor  # [B, T, L] state dtype
    stats: Tensor  # [B, T, M] state dtype
    hidden: Tensor  # [B, T, H] weights' dtype: elu of img_out


def masked_actions(action: Tensor, keep: Tensor, dtype: torch.dtype) -> Tensor:
    """Actions ``[B, T, A]`` in the products' dtype, zero where a sequence begins."""
    return torch.where(keep[..., None], action, 0).to(dtype)


def action_columns(params: RSSMParams, action: Tensor, latent: Latent) -> Tensor:
    """img_in's columns ``[H, A]`` that see the action; those of the padding see zeros."""
    width = latent.stoch * (latent.discrete or 1)
    return params.img_in_weight[:, width : width + action.shape[-1]]


def embed_columns(call: RssmObserve) -> Tensor:
    """obs_out's columns ``[H, E]`` that see the embedding; in a stack, those behind them see the lower model."""
    deter = call.params.img_out_weight.shape[1]
    return call.params.obs_out_weight[:, deter : deter + call.embed.shape[-1]]


def scan_inputs(backend: ScanBackend, call: RssmObserve) -> ScanInputs:
    """Everything that is known before the recurrence."""
    params, latent, keep = call.params, call.latent, ~call.is_first
    dtype = params.gru_weight.dtype
    shape = (*keep.shape, len(params.img_in_bias))
    if call.action is None:
        x = params.img_in_bias.repeat(*keep.shape, 1)
    else:
        columns = action_columns(params, call.action, latent)
        masked = flat(masked_actions(call.action, keep, dtype))
        x = backend.dense(masked, columns, params.img_in_bias, elu=False).view(shape)
    first = backend.product(call.state["stoch"].flatten(1).to(dtype), scan_weights(params, latent).stoch.T)
    x[:, 0] += torch.where(keep[:, :1], first, 0)
    obs = backend.dense(flat(call.embed.to(dtype)), embed_columns(call), params.obs_out_bias, elu=False)
    return ScanInputs(x, obs.view(shape))


def prior_head(
    backend: ScanBackend, params: RSSMParams, deter: Tensor, latent: Latent, noise: Tensor | None
) -> PriorTrace:
    """The prior of every step of ``deter [B, T, D]``."""
    batch, length, _ = deter.shape
    seen = flat(deter.to(params.img_out_weight.dtype))
    hidden = backend.dense(seen, params.img_out_weight, params.img_out_bias, elu=True)
    stats = backend.dense(hidden, params.img_dist_weight, params.img_dist_bias, elu=False).to(deter.dtype)
    stats, hidden = (x.view(batch, length, x.shape[1]) for x in (stats, hidden))
    return PriorTrace(backend.sample(stats, noise, latent), stats, hidden)


def flat(x: Tensor) -> Tensor:
    """``[B, T, W]`` as ``[B·T, W]``."""
    return x.flatten(0, 1)


# By name, a layer's gradient ``[B, T, out]`` before its activation, and what it saw.
Layers = dict[str, tuple[Tensor, Seen]]


def prior_backward(
    backend: ScanBackend,
    call: RssmObserve,
    trace: Trace,
    prior: PriorTrace,
    grad_stoch: Tensor | None,
    grad_stats: Tensor | None,
) -> tuple[Tensor | None, Layers]:
    """Gradient of deter ``[B, T, D]`` through the prior's head, and the head's layers."""
    params, noise, through = call.params, call.prior_noise, None
    if grad_stoch is not None:
        through = backend.sample_backward(grad_stoch, prior.stats, noise, call.latent, noise is not None)
    total = add(grad_stats, through)
    if total is None:
        return None, {}
    dtype, wide = params.img_out_weight.dtype, total.dtype
    dstats = flat(total.to(dtype))
    dhidden = backend.elu_backward(backend.product(dstats, params.img_dist_weight), flat(prior.hidden))
    ddeter = backend.product(dhidden, params.img_out_weight).to(wide).view_as(trace.deter)
    return ddeter, {
        "img_out": (dhidden.view_as(prior.hidden), [trace.deter]),
        "img_dist": (dstats.view_as(prior.stats), [prior.hidden]),
    }


def grads_out(
    backend: ScanBackend,
    call: RssmObserve,
    trace: Trace,
    prior: PriorTrace,
    post_grads: TraceGrads,
    prior_grads: TraceGrads,
) -> tuple[TraceGrads, Layers]:
    """What the backward recurrence starts from, the prior's head included, and the head's layers.

    ``prior_grads.deter`` is not read: posterior and prior share deter.
    """
    through, head = prior_backward(backend, call, trace, prior, prior_grads.stoch, prior_grads.stats)
    if call.latent.discrete and call.post_noise is None:
        post_grads = post_grads._replace(stoch=None)  # modes have no gradient
    return post_grads._replace(deter=add(post_grads.deter, through)), head


class InputGrads(NamedTuple):
    """Gradients of an op's arguments, in their dtypes."""

    params: RSSMParams
    embed: Tensor
    state_deter: Tensor
    state_stoch: Tensor
    action: Tensor | None


def products_after(
    backend: ScanBackend,
    call: RssmObserve,
    trace: Trace,
    grads: ScanGrads,
    head: Layers,
    lower: tuple[Tensor, ...] = (),
) -> InputGrads:
    """One product over B·T for every weight; ``lower`` is what obs_out saw beyond the embedding, ``[B, T, ...]``.

    Empties ``head``. The gradients of the weights are most of the memory of a backward pass: what packs weights comes
    before them, and of what they are made each is dropped behind its product; callers should not keep ``grads``.
    """
    params, latent, start, first = call.params, call.latent, call.state, call.is_first
    dtype = params.gru_weight.dtype
    dembed = backend.product(flat(grads.y), embed_columns(call)).view_as(call.embed)
    of_first = backend.product(grads.x[:, 0], scan_weights(params, latent).stoch)
    dstoch = torch.where(first[:, :1], 0, of_first).to(start["stoch"].dtype).view_as(start["stoch"])
    daction = None
    if call.action is not None:
        daction = backend.product(flat(grads.x), action_columns(params, call.action, latent))
        daction = torch.where(first[..., None], 0, daction.view_as(call.action))
        daction = daction.to(call.action.dtype)
    stoch = Before(start["stoch"], trace.stoch, first, one_hot=latent.discrete > 0)
    action = [] if call.action is None else [masked_actions(call.action, ~first, dtype)]
    layers: Layers = {
        "gru": (grads.parts, [trace.x, Before(start["deter"], trace.deter, first)]),
        "obs_out": (grads.y, [trace.deter, call.embed, *lower]),
        "img_in": (grads.x, [stoch, *action]),
        "obs_dist": (grads.stats, [trace.y]),
    }
    weights = {"gru_norm_weight": grads.norm_weight.to(dtype), "gru_norm_bias": grads.norm_bias.to(dtype)}
    ddeter = grads.deter
    del grads, trace, stoch, action
    for waiting in (layers, head):
        for name in list(waiting):
            columns = getattr(params, f"{name}_weight").shape[1]
            weights[f"{name}_weight"], weights[f"{name}_bias"] = backend.weight_gradient(*waiting.pop(name), columns)
    grad_params = (weights[name] if name in weights else torch.zeros_like(w) for name, w in params._asdict().items())
    return InputGrads(RSSMParams(*grad_params), dembed.to(call.embed.dtype), ddeter, dstoch, daction)


def like_traces(call: RssmObserve) -> tuple[Trace, PriorTrace]:
    """Empty traces."""
    trace = empty_trace(scan_weights(call.params, call.latent), start_of(call), call.latent)
    return trace, PriorTrace(*(torch.empty_like(x) for x in (trace.stoch, trace.stats, trace.y)))


OUTPUTS = ("deter", "stoch", "stats", "prior_stoch", "prior_stats")  # of one model, as an op gives them
COUNT = len(OUTPUTS)


def outputs_of(trace: Trace, prior: PriorTrace) -> list[Tensor]:
    """What callers see of the traces."""
    return [trace.deter, trace.stoch, trace.stats, prior.stoch, prior.stats]


def kept_of(trace: Trace, prior: PriorTrace) -> list[Tensor]:
    """The rest, which the backward pass needs."""
    return [trace.x, trace.parts, trace.norm, trace.y, prior.hidden]


def traces_of(outputs: list[Tensor], kept: list[Tensor]) -> tuple[Trace, PriorTrace]:
    """The traces, put together again."""
    deter, stoch, stats, prior_stoch, prior_stats = outputs
    *rest, hidden = kept
    return Trace(deter, stoch, stats, *rest), PriorTrace(prior_stoch, prior_stats, hidden)


def trace_grads(grads: list[Tensor | None]) -> tuple[TraceGrads, TraceGrads]:
    """Those of the outputs, of posterior and prior."""
    deter, stoch, stats, prior_stoch, prior_stats = grads
    return TraceGrads(deter, stoch, stats), TraceGrads(None, prior_stoch, prior_stats)


def constants_of(call: RssmObserve) -> list[int]:
    """Which outputs have no gradient: modes of one-hots."""
    noises = {1: call.post_noise, 3: call.prior_noise}
    return [i for i, noise in noises.items() if noise is None] if call.latent.discrete else []


def states_of(outputs: list[Tensor], latent: Latent) -> tuple[State, State]:
    """Posterior and prior with DreamerV2's keys."""
    deter, stoch, stats, prior_stoch, prior_stats = outputs
    return state_of(deter, stoch, stats, latent), state_of(deter, prior_stoch, prior_stats, latent)

"""``rssm_observe`` around a core: products before the recurrence, the recurrence, products after it; one opaque op.

Before: the embedding's part of obs_out and the action's part of img_in, one product over B·T each. After: the prior's
head, likewise. Backward, the other way round: the prior's head, the reverse recurrence, then one product over B·T for
the gradient of every weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apv_fast.reference.noise import whole_noise
from apv_fast.scan.core import (
    Core,
    ScanInputs,
    ScanStart,
    Trace,
    TraceGrads,
    elu_grad,
    sample_latent,
    sample_latent_backward,
    scan_weights,
)
from apv_fast.structure import Latent, RSSMParams, State

Observe = Callable[..., tuple[State, State]]


class ObserveArguments(NamedTuple):
    """The checked arguments of ``rssm_observe`` without the weights; the order of the opaque op's schema."""

    embed: Tensor  # [B, T, E]
    is_first: Tensor  # [B, T] bool
    action: Tensor | None  # [B, T, A]
    deter: Tensor  # [B, D]
    stoch: Tensor  # [B, S, C] or [B, S]
    S: int
    C: int
    min_std: float
    post_noise: Tensor | None
    prior_noise: Tensor | None

    @property
    def latent(self) -> Latent:
        """The kind of latent."""
        return Latent(self.S, self.C, self.min_std)

    @property
    def start(self) -> ScanStart:
        """Where the recurrence starts."""
        return ScanStart(~self.is_first, self.deter.contiguous(), self.post_noise)


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


def scan_inputs(params: RSSMParams, arguments: ObserveArguments) -> ScanInputs:
    """Everything that is known before the recurrence."""
    dtype, latent = params.gru_weight.dtype, arguments.latent
    keep = ~arguments.is_first
    batch, length = keep.shape
    if arguments.action is None:
        x = params.img_in_bias.expand(batch, length, -1).contiguous()
    else:
        columns = action_columns(params, arguments.action, latent)
        x = F.linear(masked_actions(arguments.action, keep, dtype), columns, params.img_in_bias)
    first = arguments.stoch.flatten(1).to(dtype) @ scan_weights(params, latent).stoch.T
    x[:, 0] += torch.where(keep[:, :1], first, 0)
    columns = params.obs_out_weight[:, arguments.deter.shape[1] :]
    obs = F.linear(arguments.embed.to(dtype), columns, params.obs_out_bias)
    return ScanInputs(x, obs)


def prior_head(params: RSSMParams, deter: Tensor, latent: Latent, noise: Tensor | None) -> PriorTrace:
    """The prior of every step of ``deter [B, T, D]``."""
    hidden = F.elu(F.linear(deter.to(params.img_out_weight.dtype), params.img_out_weight, params.img_out_bias))
    stats = F.linear(hidden, params.img_dist_weight, params.img_dist_bias).to(deter.dtype)
    noise = whole_noise(noise, tuple(deter.shape[:2]), latent, stats.dtype)
    return PriorTrace(sample_latent(stats, noise, latent), stats, hidden)


def flat(x: Tensor) -> Tensor:
    """``[B, T, W]`` as ``[B·T, W]``."""
    return x.reshape(-1, x.shape[-1])


def _total(*terms: Tensor | None) -> Tensor | None:
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None


def before_steps(arguments: ObserveArguments, trace: Trace, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What every step started from, masked: stoch ``[B, T, L]`` and deter ``[B, T, D]`` in the products' dtype."""
    keep = ~arguments.is_first[..., None]
    starts = ((arguments.stoch.flatten(1), trace.stoch), (arguments.deter, trace.deter))
    stoch, deter = (
        torch.where(keep, torch.cat([first[:, None].to(dtype), rest[:, :-1].to(dtype)], 1), 0) for first, rest in starts
    )
    return stoch, deter


def prior_backward(
    params: RSSMParams,
    trace: Trace,
    prior: PriorTrace,
    latent: Latent,
    noise: Tensor | None,
    grad_stoch: Tensor | None,
    grad_stats: Tensor | None,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Gradient of deter ``[B, T, D]`` through the prior's head, and of the head's weights by name."""
    through = None
    if grad_stoch is not None:
        whole = whole_noise(noise, tuple(trace.deter.shape[:2]), latent, prior.stats.dtype)
        through = sample_latent_backward(grad_stoch, prior.stats, whole, latent, noise is not None)
    total = _total(grad_stats, through)
    if total is None:
        return None, {}
    dtype = params.img_out_weight.dtype
    dstats = flat(total.to(dtype))
    dhidden = ((dstats @ params.img_dist_weight).to(total.dtype) * elu_grad(flat(prior.hidden))).to(dtype)
    weights = {
        "img_dist_weight": dstats.T @ flat(prior.hidden),
        "img_dist_bias": dstats.sum(0),
        "img_out_weight": dhidden.T @ flat(trace.deter.to(dtype)),
        "img_out_bias": dhidden.sum(0),
    }
    return (dhidden @ params.img_out_weight).to(total.dtype).view_as(trace.deter), weights


def observe_forward(core: Core, params: RSSMParams, arguments: ObserveArguments) -> tuple[Trace, PriorTrace]:
    """Posterior and prior of a sequence, and what the backward pass needs."""
    latent = arguments.latent
    trace = core.forward(scan_weights(params, latent), scan_inputs(params, arguments), arguments.start, latent)
    return trace, prior_head(params, trace.deter, latent, arguments.prior_noise)


def observe_backward(
    core: Core,
    params: RSSMParams,
    arguments: ObserveArguments,
    trace: Trace,
    prior: PriorTrace,
    post_grads: TraceGrads,
    prior_grads: TraceGrads,
) -> tuple[RSSMParams, Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of the weights, embed, action, deter and stoch. ``prior_grads.deter`` is not read: deter is shared."""
    latent, dtype = arguments.latent, params.gru_weight.dtype
    through, weights = prior_backward(
        params, trace, prior, latent, arguments.prior_noise, prior_grads.stoch, prior_grads.stats
    )
    if latent.discrete and arguments.post_noise is None:
        post_grads = post_grads._replace(stoch=None)  # modes have no gradient
    post_grads = post_grads._replace(deter=_total(post_grads.deter, through))
    grads = core.backward(scan_weights(params, latent), arguments.start, trace, post_grads, latent)
    stoch, deter = before_steps(arguments, trace, dtype)
    dx, dy, dstats, dparts = flat(grads.x), flat(grads.y), flat(grads.stats), flat(grads.parts)
    seen = torch.cat([trace.deter.to(dtype), arguments.embed.to(dtype)], -1)
    columns, daction = [dx.T @ flat(stoch)], None
    pad = params.img_in_weight.shape[1] - stoch.shape[-1]
    if arguments.action is not None:
        keep = ~arguments.is_first
        columns.append(dx.T @ flat(masked_actions(arguments.action, keep, dtype)))
        pad -= arguments.action.shape[-1]
        daction = grads.x @ action_columns(params, arguments.action, latent)
        daction = torch.where(keep[..., None], daction, 0).to(arguments.action.dtype)
    weights |= {
        "img_in_weight": torch.cat([*columns, dx.new_zeros(len(dx.T), pad)], 1),
        "img_in_bias": dx.sum(0),
        "gru_weight": torch.cat([dparts.T @ flat(trace.x), dparts.T @ flat(deter)], 1),
        "gru_bias": dparts.sum(0),
        "gru_norm_weight": grads.norm_weight.to(dtype),
        "gru_norm_bias": grads.norm_bias.to(dtype),
        "obs_out_weight": dy.T @ flat(seen),
        "obs_out_bias": dy.sum(0),
        "obs_dist_weight": dstats.T @ flat(trace.y),
        "obs_dist_bias": dstats.sum(0),
    }
    dembed = (grads.y @ params.obs_out_weight[:, arguments.deter.shape[1] :]).to(arguments.embed.dtype)
    first = grads.x[:, 0] @ scan_weights(params, latent).stoch
    dstoch = torch.where(~arguments.is_first[:, :1], first, 0).to(arguments.stoch.dtype).view_as(arguments.stoch)
    made = (weights[name] if name in weights else torch.zeros_like(w) for name, w in params._asdict().items())
    return RSSMParams(*made), dembed, daction, grads.deter, dstoch


def define_observe(name: str, core: Core) -> Observe:
    """``rssm_observe`` on ``core``, behind the opaque op ``apv_fast::rssm_observe_NAME``."""

    @torch.library.custom_op(f"apv_fast::rssm_observe_{name}", mutates_args=())
    def forward(
        params: Sequence[Tensor],
        embed: Tensor,
        is_first: Tensor,
        action: Tensor | None,
        deter: Tensor,
        stoch: Tensor,
        S: int,
        C: int,
        min_std: float,
        post_noise: Tensor | None,
        prior_noise: Tensor | None,
    ) -> list[Tensor]:
        arguments = ObserveArguments(embed, is_first, action, deter, stoch, S, C, min_std, post_noise, prior_noise)
        trace, prior = observe_forward(core, RSSMParams(*params), arguments)
        return [*trace, *prior]

    @torch.library.custom_op(f"apv_fast::rssm_observe_{name}_backward", mutates_args=())
    def backward(
        params: Sequence[Tensor],
        embed: Tensor,
        is_first: Tensor,
        action: Tensor | None,
        deter: Tensor,
        stoch: Tensor,
        S: int,
        C: int,
        min_std: float,
        post_noise: Tensor | None,
        prior_noise: Tensor | None,
        traces: Sequence[Tensor],
        grad_deter: Tensor | None,
        grad_stoch: Tensor | None,
        grad_stats: Tensor | None,
        grad_prior_stoch: Tensor | None,
        grad_prior_stats: Tensor | None,
    ) -> list[Tensor]:
        arguments = ObserveArguments(embed, is_first, action, deter, stoch, S, C, min_std, post_noise, prior_noise)
        trace, prior = split_trace(traces)
        weights, dembed, daction, ddeter, dstoch = observe_backward(
            core,
            RSSMParams(*params),
            arguments,
            trace,
            prior,
            TraceGrads(grad_deter, grad_stoch, grad_stats),
            TraceGrads(None, grad_prior_stoch, grad_prior_stats),
        )
        return [*weights, dembed, ddeter, dstoch, *([] if daction is None else [daction])]

    @forward.register_fake
    def _(params: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
        return [*fake_traces(RSSMParams(*params), ObserveArguments(*arguments))]

    @backward.register_fake
    def _(params: Sequence[Tensor], *rest: Any) -> list[Tensor]:
        arguments = ObserveArguments(*rest[: len(ObserveArguments._fields)])
        like = [*params, arguments.embed, arguments.deter, arguments.stoch]
        like += [] if arguments.action is None else [arguments.action]
        return [x.new_empty(x.shape) for x in like]

    forward.register_autograd(_differentiation(backward), setup_context=_save)

    def observe(
        params: RSSMParams,
        embed: Tensor,
        is_first: Tensor,
        action: Tensor | None,
        state: State,
        latent: Latent,
        post_noise: Tensor | None,
        prior_noise: Tensor | None,
    ) -> tuple[State, State]:
        made = forward(
            list(params), embed, is_first, action, state["deter"], state["stoch"], *latent, post_noise, prior_noise
        )
        return states(*split_trace(made), latent)

    return observe


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    params, *rest = inputs
    ctx.set_materialize_grads(False)
    ctx.constants = {name: x for name, x in zip(ObserveArguments._fields, rest, strict=True) if not _is_tensor(x)}
    ctx.weights = len(params)
    tensors = [x for x in rest if _is_tensor(x)]
    ctx.traces = len(params) + len(tensors)
    ctx.save_for_backward(*params, *tensors, *output)
    differentiable = ("deter", "stoch", "stats")
    names = (*Trace._fields, *(f"prior {name}" for name in PriorTrace._fields))
    ctx.mark_non_differentiable(
        *(x for name, x in zip(names, output, strict=True) if name.removeprefix("prior ") not in differentiable)
    )


def _is_tensor(x: object) -> bool:
    return isinstance(x, Tensor)


def _differentiation(backward: Callable[..., list[Tensor]]) -> Callable[..., tuple[Any, ...]]:
    def differentiate(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
        saved = list(ctx.saved_tensors)
        params, tensors, traces = saved[: ctx.weights], iter(saved[ctx.weights : ctx.traces]), saved[ctx.traces :]
        values = [ctx.constants[f] if f in ctx.constants else next(tensors) for f in ObserveArguments._fields]
        arguments = ObserveArguments(*values)
        post, prior = split_trace(grads)  # type: ignore[arg-type]
        given = (post.deter, post.stoch, post.stats, prior.stoch, prior.stats)
        made = backward(params, *arguments, traces, *given)
        weights, (dembed, ddeter, dstoch, *daction) = made[: len(params)], made[len(params) :]
        of = {"embed": dembed, "deter": ddeter, "stoch": dstoch, "action": daction[0] if daction else None}
        return weights, *(of.get(name) for name in ObserveArguments._fields)

    return differentiate


def fake_traces(params: RSSMParams, arguments: ObserveArguments) -> tuple[Tensor, ...]:
    """Empty tensors of the traces' shapes and dtypes."""
    (batch, length), latent, like = arguments.is_first.shape, arguments.latent, arguments.deter
    hidden, deter, mixed = len(params.img_in_bias), like.shape[1], latent.stoch * (latent.discrete or 1)
    stats, narrow = len(params.obs_dist_bias), params.gru_weight
    widths = {"deter": deter, "stoch": mixed, "stats": stats, "x": hidden, "parts": 3 * deter, "norm": 2, "y": hidden}
    trace = {
        name: (narrow if name in ("x", "y") else like).new_empty(batch, length, width) for name, width in widths.items()
    }
    prior = (like.new_empty(batch, length, mixed), like.new_empty(batch, length, stats))
    return *Trace(**trace), *prior, narrow.new_empty(batch, length, hidden)


def split_trace(traces: Sequence[Tensor]) -> tuple[Trace, PriorTrace]:
    """The two traces of one op's outputs."""
    split = len(Trace._fields)
    return Trace(*traces[:split]), PriorTrace(*traces[split:])


def states(trace: Trace, prior: PriorTrace, latent: Latent) -> tuple[State, State]:
    """Posterior and prior with DreamerV2's keys; views of the traces, except for Gaussian std."""

    def state(stoch: Tensor, stats: Tensor) -> State:
        if latent.discrete:
            shape = (latent.stoch, latent.discrete)
            return {"deter": trace.deter, "stoch": stoch.unflatten(-1, shape), "logit": stats.unflatten(-1, shape)}
        mean, raw = stats.chunk(2, -1)
        return {"deter": trace.deter, "stoch": stoch, "mean": mean, "std": 2 * torch.sigmoid(raw / 2) + latent.min_std}

    return state(trace.stoch, trace.stats), state(prior.stoch, prior.stats)

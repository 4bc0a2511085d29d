"""The rival of whole updates: the reference's, compiled; whoever times it records all of it as one CUDA graph.

Three functions are compiled, each as one graph with its backward: the world model's loss, the losses of actor and
critic, and a step of Adam. Compiled as they stand, the reference's loops over time would be unrolled, which takes many
minutes; so here they are PyTorch's scans around hoisted products (:mod:`bench.rivals.scanned`), as TorchRL does it. The
mathematics, the weights and the optimiser are the reference's.

Limits: as in :mod:`bench.rivals.scanned`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from apv_fast import ops
from apv_fast.agent import behavior
from apv_fast.agent.agent import Agent, Pretrainer
from apv_fast.reference.rssm_step import feat
from apv_fast.types import ActorParams, Latent, RSSMParams, State, state_dtype
from bench.rivals import scanned


def compile_update(learner: Pretrainer | Agent, backend: str = "inductor") -> None:
    """Make ``learner``, which must have been made with the reference as its backend, run compiled functions.

    Raises:
        ScanError: this PyTorch's scan cannot be used.
    """
    scanned.check()
    _replace(learner.model, "loss", _traced(learner.model.loss, backend))
    optimizers = [learner.optimizer] if isinstance(learner, Pretrainer) else list(learner.optimizers.values())
    for optimizer in optimizers:
        optimizer._take = torch.compile(optimizer._take, backend=backend, dynamic=False, fullgraph=True)
    if isinstance(learner, Agent):
        losses = _traced(learner.behavior.losses, backend)

        @functools.wraps(losses)
        def with_frozen_model(model: Any, *arguments: Any) -> Any:
            with behavior.frozen(model):  # outside: what requires gradients may not change inside of a graph
                return losses(model, *arguments)

        _replace(learner.behavior, "losses", with_frozen_model)


def _replace(owner: object, name: str, function: Callable[..., Any]) -> None:
    """A method of this one object."""
    setattr(owner, name, function)


def _traced(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """Compiled with scans in place of the reference's loops, which the compiler finds while it traces."""
    compiled = scanned.compiled(function, backend)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        with scans():
            return compiled(*arguments)

    return call


@contextlib.contextmanager
def scans() -> Iterator[None]:
    """Inside, the ops that loop over time are scans of the same mathematics."""
    loops: dict[str, Any] = {"rssm_observe": observe, "stacked_observe": stacked_observe, "rssm_rollout": rollout}
    nothing: dict[str, Any] = {"frozen": lambda *modules: contextlib.nullcontext()}
    with mock.patch.multiple(ops, **loops), mock.patch.multiple(behavior, **nothing):
        yield


def observe(
    params: RSSMParams,
    embed: Tensor,
    is_first: Tensor,
    action: Tensor | None,
    state: State | None,
    *,
    latent: Latent,
    noise: tuple[Tensor, Tensor] | None = None,
    **rest: object,
) -> tuple[State, State]:
    """:func:`apv_fast.ops.rssm_observe` from zeros, with samples."""
    assert state is None, "the scan starts from zeros"
    dtype, device = state_dtype(params.gru_weight.dtype), embed.device
    leading = embed.shape[:2]
    if noise is None:
        first = ops.sample_noise(latent, *leading, dtype=dtype, device=device)
        noise = (first, ops.sample_noise(latent, *leading, dtype=dtype, device=device))
    shapes = ((leading[0], params.img_out_weight.shape[1]), (leading[0], latent.stoch, latent.discrete))
    zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape in shapes)
    deter, stoch = (scanned.differentiable(x, params.gru_bias) for x in zeros)
    deter, stoch, logit, prior_stoch, prior_logit = scanned.observe(
        params, embed, is_first, action, latent, *noise, (deter, stoch)
    )
    return (
        {"deter": deter, "stoch": stoch, "logit": logit},
        {"deter": deter, "stoch": prior_stoch, "logit": prior_logit},
    )


def stacked_observe(
    af_params: RSSMParams,
    params: RSSMParams,
    embed: Tensor,
    is_first: Tensor,
    action: Tensor,
    af_state: State | None,
    state: State | None,
    *,
    af_latent: Latent,
    latent: Latent,
    concat_embed: bool = False,
    af_noise: tuple[Tensor, Tensor] | None = None,
    noise: tuple[Tensor, Tensor] | None = None,
    **rest: object,
) -> dict[str, State]:
    """:func:`apv_fast.ops.stacked_observe` from zeros, with samples."""
    af_post, af_prior = observe(af_params, embed, is_first, None, af_state, latent=af_latent, noise=af_noise)
    upper = feat(af_post)
    if concat_embed:
        upper = torch.cat([embed.to(upper.dtype), upper], -1)
    post, prior = observe(params, upper, is_first, action, state, latent=latent, noise=noise)
    return {"af_post": af_post, "af_prior": af_prior, "post": post, "prior": prior}


def rollout(
    params: RSSMParams,
    actor: ActorParams,
    state: State,
    *,
    horizon: int,
    latent: Latent,
    min_std: float = 0.1,
    noise: Tensor | None = None,
    action_noise: Tensor | None = None,
    **rest: object,
) -> tuple[State, Tensor]:
    """:func:`apv_fast.ops.rssm_rollout`; continuous actions."""
    dtype, device, rows = state["deter"].dtype, state["deter"].device, len(state["deter"])
    if action_noise is None:
        action_noise = torch.rand(horizon, rows, len(actor.out_bias), dtype=dtype, device=device)
    if noise is None:
        noise = ops.sample_noise(latent, horizon, rows, dtype=dtype, device=device)
    frozen = RSSMParams(*(weight.detach() for weight in params))
    return scanned.rollout(frozen, actor, state, latent, min_std, noise, action_noise)

"""``rssm_imagine`` and ``rssm_rollout`` around an engine, each as one opaque op that autograd knows.

An engine walks forward and back (:class:`Imagination`, :class:`Rollout`). Here is what all of them share: schemas,
fakes for tracing, what is kept for the way back, and which gradient belongs to which argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from apv_fast.types import ActorParams, Latent, RSSMParams, State, state_of

WEIGHTS = RSSMParams._fields.index("obs_out_weight")  # a step without looking reads those before it
OUTPUTS = 3  # deter, stoch, stats: of what an engine leaves, the tensors that have gradients


class ImagineCall(NamedTuple):
    """Arguments of ``rssm_imagine`` without the weights, in the schema's order."""

    action: Tensor | None  # [N, T, A]
    deter: Tensor  # [N, D]
    stoch: Tensor  # [N, S, C] or [N, S]
    horizon: int
    S: int
    C: int
    min_std: float
    noise: Tensor | None  # [N, T, S, C] or [N, T, S], or a seed

    @property
    def latent(self) -> Latent:
        """The kind of latent."""
        return Latent(self.S, self.C, self.min_std)

    @property
    def width(self) -> int:
        """L, of a flat latent."""
        return self.S * (self.C or 1)


class RolloutCall(NamedTuple):
    """Arguments of ``rssm_rollout`` without the weights, in the schema's order."""

    deter: Tensor  # [N, D]
    stoch: Tensor  # [N, S, C] or [N, S]
    horizon: int
    S: int
    C: int
    latent_min_std: float
    min_std: float
    discrete: bool
    noise: Tensor  # [H, N, S, C] or [H, N, S], or a seed
    action_noise: Tensor  # [H, N, A], or a seed

    @property
    def latent(self) -> Latent:
        """The kind of latent."""
        return Latent(self.S, self.C, self.latent_min_std)

    @property
    def width(self) -> int:
        """L, of a flat latent."""
        return self.S * (self.C or 1)


class Imagination(Protocol):
    """An engine of ``rssm_imagine``; flat latents ``[N, T, L]`` and statistics ``[N, T, M]`` throughout."""

    def forward(self, weights: list[Tensor], call: ImagineCall, keep: bool) -> list[Tensor]:
        """deter, stoch, stats and, with ``keep``, what the way back needs."""

    def backward(
        self,
        weights: list[Tensor],
        call: ImagineCall,
        trace: list[Tensor],
        grads: list[Tensor | None],
        of_stoch: bool,
        of_action: bool,
        of_weights: bool,
    ) -> list[Tensor]:
        """Gradients of deter, stoch, action and the weights, the latter three empty unless asked for."""

    def kept(self, weights: Sequence[Tensor], call: ImagineCall) -> list[Tensor]:
        """Empty tensors like those that ``forward`` adds with ``keep``."""


class Rollout(Protocol):
    """An engine of ``rssm_rollout``; as :class:`Imagination`, but steps first, and with the actor's tensors."""

    def forward(self, weights: list[Tensor], actor: list[Tensor], call: RolloutCall, keep: bool) -> list[Tensor]:
        """deter, stoch, stats, the actions ``[H, N, A]`` and, with ``keep``, what the way back needs."""

    def backward(
        self,
        weights: list[Tensor],
        actor: list[Tensor],
        call: RolloutCall,
        trace: list[Tensor],
        grads: list[Tensor | None],
        of_stoch: bool,
        of_actor: bool,
    ) -> list[Tensor]:
        """Gradients of deter, stoch and the actor's tensors, the latter two empty unless asked for."""

    def kept(self, weights: Sequence[Tensor], actor: Sequence[Tensor], call: RolloutCall) -> list[Tensor]:
        """Empty tensors like those that ``forward`` adds with ``keep``."""


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether anything will ask for the way back from these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _outputs(like: Tensor, leading: tuple[int, int], deter: int, width: int, statistics: int) -> list[Tensor]:
    return [like.new_empty(*leading, w) for w in (deter, width, statistics)]


def _grads_like(wanted: bool, tensors: Sequence[Tensor], nothing: Tensor) -> list[Tensor]:
    return [x.new_empty(x.shape) if wanted else nothing.new_empty(0) for x in tensors]


def define_imagine(name: str, engine: Imagination) -> Callable[..., State]:
    """``rssm_imagine`` on ``engine``, behind the opaque op ``apv_fast::rssm_imagine_NAME``."""
    schema = (
        "Tensor[] weights, Tensor? action, Tensor deter, Tensor stoch, int horizon, int S, int C, float min_std, "
        "Tensor? noise"
    )

    # Schemas in full: what torch infers from a signature with sequences differs between its versions.
    @torch.library.custom_op(
        f"apv_fast::rssm_imagine_{name}", mutates_args=(), schema=f"({schema}, bool keep) -> Tensor[]"
    )
    def forward(weights: list[Tensor], *rest: Any) -> list[Tensor]:
        *arguments, keep = rest
        return engine.forward(weights, ImagineCall(*arguments), keep)

    @torch.library.custom_op(
        f"apv_fast::rssm_imagine_{name}_backward",
        mutates_args=(),
        schema=f"({schema}, Tensor[] trace, Tensor?[] grads, bool[] needs) -> Tensor[]",
    )
    def backward(weights: list[Tensor], *rest: Any) -> list[Tensor]:
        *arguments, trace, grads, needs = rest
        return engine.backward(weights, ImagineCall(*arguments), trace, grads, *needs)

    @forward.register_fake
    def _(weights: Sequence[Tensor], *rest: Any) -> list[Tensor]:
        *arguments, keep = rest
        call, like = ImagineCall(*arguments), rest[1]
        leading = (like.shape[0], call.horizon)
        outputs = _outputs(like, leading, like.shape[1], call.width, weights[-1].shape[0])
        return outputs + (engine.kept(weights, call) if keep else [])

    @backward.register_fake
    def _(weights: Sequence[Tensor], *rest: Any) -> list[Tensor]:
        *arguments, _, _, (of_stoch, of_action, of_weights) = rest
        call = ImagineCall(*arguments)
        action = call.deter if call.action is None else call.action
        return [
            call.deter.new_empty(call.deter.shape),
            *_grads_like(of_stoch, [call.stoch], call.deter),
            *_grads_like(of_action and call.action is not None, [action], call.deter),
            *_grads_like(of_weights, weights, call.deter),
        ]

    def save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        weights, action, deter, stoch, horizon, S, C, min_std, noise, keep = inputs
        ctx.set_materialize_grads(False)
        ctx.numbers, ctx.count = (horizon, S, C, min_std), len(weights)
        mode = C and noise is None  # which has no gradient
        ctx.mark_non_differentiable(*output[1:2] if mode else (), *output[OUTPUTS:])
        if keep:
            ctx.save_for_backward(*weights, action, deter, stoch, noise, *output)

    def differentiate(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
        saved, count = list(ctx.saved_tensors), ctx.count
        weights, (action, deter, stoch, noise), trace = saved[:count], saved[count : count + 4], saved[count + 4 :]
        of_weights, of_action, of_deter, of_stoch, *_ = ctx.needs_input_grad
        needs = [of_stoch, of_action, any(of_weights)]
        given = list(grads[:OUTPUTS])
        made = backward(weights, action, deter, stoch, *ctx.numbers, noise, trace, given, needs)
        d_deter, d_stoch, d_action, *d_weights = made
        return (
            d_weights if needs[2] else [None] * count,
            d_action if of_action else None,
            d_deter if of_deter else None,
            d_stoch if of_stoch else None,
            *(None for _ in (*ctx.numbers, "noise", "keep")),
        )

    forward.register_autograd(differentiate, setup_context=save)

    def rssm_imagine(
        params: RSSMParams, state: State, action: Tensor | None, horizon: int, latent: Latent, noise: Tensor | None
    ) -> State:
        """Roll the prior out; arguments and result as :func:`apv_fast.reference.rssm.rssm_imagine`, which see."""
        weights, start = list(params[:WEIGHTS]), (state["deter"], state["stoch"])
        keep = wants_gradients(*weights, action, *start)
        deter, stoch, stats, *_ = forward(weights, action, *start, horizon, *latent, noise, keep)
        return state_of(deter, stoch, stats, latent)

    return rssm_imagine


def define_rollout(name: str, engine: Rollout) -> Callable[..., tuple[State, Tensor]]:
    """``rssm_rollout`` on ``engine``, behind the opaque op ``apv_fast::rssm_rollout_NAME``."""
    schema = (
        "Tensor[] weights, Tensor[] actor, Tensor deter, Tensor stoch, int horizon, int S, int C, "
        "float latent_min_std, float min_std, bool discrete, Tensor noise, Tensor action_noise"
    )

    @torch.library.custom_op(
        f"apv_fast::rssm_rollout_{name}", mutates_args=(), schema=f"({schema}, bool keep) -> Tensor[]"
    )
    def forward(weights: list[Tensor], actor: list[Tensor], *rest: Any) -> list[Tensor]:
        *arguments, keep = rest
        return engine.forward(weights, actor, RolloutCall(*arguments), keep)

    @torch.library.custom_op(
        f"apv_fast::rssm_rollout_{name}_backward",
        mutates_args=(),
        schema=f"({schema}, Tensor[] trace, Tensor?[] grads, bool of_stoch, bool of_actor) -> Tensor[]",
    )
    def backward(weights: list[Tensor], actor: list[Tensor], *rest: Any) -> list[Tensor]:
        *arguments, trace, grads, of_stoch, of_actor = rest
        return engine.backward(weights, actor, RolloutCall(*arguments), trace, grads, of_stoch, of_actor)

    @forward.register_fake
    def _(weights: Sequence[Tensor], actor: Sequence[Tensor], *rest: Any) -> list[Tensor]:
        *arguments, keep = rest
        call, like = RolloutCall(*arguments), rest[0]
        leading = (call.horizon, like.shape[0])
        outputs = _outputs(like, leading, like.shape[1], call.width, weights[-1].shape[0])
        actions = ActorParams.of(list(actor), call.discrete).out_bias.shape[0]
        outputs.append(like.new_empty(*leading, actions))
        return outputs + (engine.kept(weights, actor, call) if keep else [])

    @backward.register_fake
    def _(weights: Sequence[Tensor], actor: Sequence[Tensor], *rest: Any) -> list[Tensor]:
        *arguments, _, _, of_stoch, of_actor = rest
        call = RolloutCall(*arguments)
        return [
            call.deter.new_empty(call.deter.shape),
            *_grads_like(of_stoch, [call.stoch], call.deter),
            *_grads_like(of_actor, actor, call.deter),
        ]

    def save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        weights, actor, deter, stoch, *numbers, noise, action_noise, keep = inputs
        ctx.set_materialize_grads(False)
        ctx.numbers, ctx.counts = numbers, (len(weights), len(actor))
        ctx.mark_non_differentiable(*output[OUTPUTS + 1 :])
        if keep:
            ctx.save_for_backward(*weights, *actor, deter, stoch, noise, action_noise, *output)

    def differentiate(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
        saved, (models, actors) = list(ctx.saved_tensors), ctx.counts
        weights, actor, rest = saved[:models], saved[models : models + actors], saved[models + actors :]
        deter, stoch, noise, action_noise, *trace = rest
        _, of_actor, of_deter, of_stoch, *_ = ctx.needs_input_grad
        wanted, given = any(of_actor), list(grads[: OUTPUTS + 1])
        start, noises = (deter, stoch), (noise, action_noise)
        made = backward(weights, actor, *start, *ctx.numbers, *noises, trace, given, of_stoch, wanted)
        d_deter, d_stoch, *d_actor = made
        return (
            [None] * models,
            d_actor if wanted else [None] * actors,
            d_deter if of_deter else None,
            d_stoch if of_stoch else None,
            *(None for _ in (*ctx.numbers, "noise", "action_noise", "keep")),
        )

    forward.register_autograd(differentiate, setup_context=save)

    def rssm_rollout(
        params: RSSMParams,
        actor: ActorParams,
        state: State,
        horizon: int,
        latent: Latent,
        min_std: float,
        noise: Tensor,
        action_noise: Tensor,
    ) -> tuple[State, Tensor]:
        """Arguments and result as :func:`apv_fast.reference.rssm_rollout.rssm_rollout`, which see."""
        weights, own = list(params[:WEIGHTS]), actor.flat()
        start, noises = (state["deter"], state["stoch"]), (noise, action_noise)
        keep = wants_gradients(*own, *start)
        made = forward(weights, own, *start, horizon, *latent, min_std, actor.discrete, *noises, keep)
        deter, stoch, stats, action, *_ = made
        return state_of(deter, stoch, stats, latent), action

    return rssm_rollout

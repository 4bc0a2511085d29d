"""``rssm_imagine`` and ``rssm_rollout`` as kernels: what backends are called with, and what they leave.

A backend walks forward and back; flat latents ``[..., L]`` and statistics ``[..., M]`` throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from apv_fast.ops.op import Gradients, Kernel
from apv_fast.ops.rssm_imagine import RssmImagine
from apv_fast.ops.rssm_rollout import RssmRollout
from apv_fast.types import ActorParams, Latent, RSSMParams, State, state_of

WEIGHTS = RSSMParams._fields.index("obs_out_weight")  # a step without looking reads those before it
OUTPUTS = 3  # deter, stoch, stats


class ImagineCall(NamedTuple):
    """:class:`apv_fast.ops.rssm_imagine.RssmImagine` with the weights that a step without looking reads."""

    weights: list[Tensor]  # the first of RSSMParams
    state: State  # deter [N, D], stoch [N, S, C] or [N, S]
    action: Tensor | None  # [N, T, A]
    horizon: int
    latent: Latent
    noise: Tensor | None  # [N, T, S, C] or [N, T, S], or a seed

    @property
    def width(self) -> int:
        """L, of a flat latent."""
        return self.latent.stoch * (self.latent.discrete or 1)


class RolloutCall(NamedTuple):
    """:class:`apv_fast.ops.rssm_rollout.RssmRollout` with the weights that a step without looking reads."""

    weights: list[Tensor]  # the first of RSSMParams
    actor: ActorParams
    state: State  # deter [N, D], stoch [N, S, C] or [N, S]
    horizon: int
    latent: Latent
    min_std: float
    noise: Tensor  # [H, N, S, C] or [H, N, S], or a seed
    action_noise: Tensor  # [H, N, A], or a seed

    @property
    def width(self) -> int:
        """L, of a flat latent."""
        return self.latent.stoch * (self.latent.discrete or 1)


def as_sequence(x: Tensor | None) -> Tensor | None:
    """One step ``[B, ...]`` as a sequence ``[B, 1, ...]``; a seed stays one."""
    return x if x is None or x.dim() == 0 else x[:, None]


def _outputs(call: ImagineCall | RolloutCall, *leading: int) -> list[Tensor]:
    """Empty deter, stoch and stats."""
    like = call.state["deter"]
    return [like.new_empty(*leading, width) for width in (like.shape[1], call.width, call.weights[-1].shape[0])]


def imagine_on(
    name: str,
    forward: Callable[[ImagineCall, bool], list[Tensor]],
    backward: Callable[[ImagineCall, list[Tensor], list[Tensor | None], frozenset[str]], Gradients],
    kept: Callable[[ImagineCall], list[Tensor]],
) -> Callable[..., State]:
    """``rssm_imagine`` of the backend ``name``; see :class:`apv_fast.ops.op.Kernel`.

    Args:
        name: the backend.
        forward: leaves deter, stoch and stats ``[N, T, ...]`` and, with ``keep``, what the way back needs.
        backward: the way back.
        kept: empty tensors like those that ``forward`` adds with ``keep``.
    """

    def fake(call: ImagineCall, keep: bool) -> list[Tensor]:
        outputs = _outputs(call, call.state["deter"].shape[0], call.horizon)
        return outputs + (kept(call) if keep else [])

    kernel = Kernel(
        f"rssm_imagine_{name}",
        ImagineCall,
        outputs=OUTPUTS,
        forward=forward,
        backward=backward,
        fake=fake,
        constant=lambda call: [1] if call.latent.discrete and call.noise is None else [],  # modes of one-hots
    )

    def rssm_imagine(*fields: Any) -> State:
        call = RssmImagine(*fields)
        deter, stoch, stats = kernel(list(call.params[:WEIGHTS]), *call[1:])
        return state_of(deter, stoch, stats, call.latent)

    return rssm_imagine


def rollout_on(
    name: str,
    forward: Callable[[RolloutCall, bool], list[Tensor]],
    backward: Callable[[RolloutCall, list[Tensor], list[Tensor | None], frozenset[str]], Gradients],
    kept: Callable[[RolloutCall], list[Tensor]],
) -> Callable[..., tuple[State, Tensor]]:
    """``rssm_rollout`` of the backend ``name``, as :func:`imagine_on`; steps come first, and the actions are the
    fourth output. The world model's weights count as constants.
    """

    def fake(call: RolloutCall, keep: bool) -> list[Tensor]:
        like, actions = call.state["deter"], call.actor.out_bias.shape[0]
        leading = (call.horizon, like.shape[0])
        outputs = [*_outputs(call, *leading), like.new_empty(*leading, actions)]
        return outputs + (kept(call) if keep else [])

    kernel = Kernel(
        f"rssm_rollout_{name}", RolloutCall, outputs=OUTPUTS + 1, forward=forward, backward=backward, fake=fake
    )

    def rssm_rollout(*fields: Any) -> tuple[State, Tensor]:
        call = RssmRollout(*fields)
        deter, stoch, stats, action = kernel([weight.detach() for weight in call.params[:WEIGHTS]], *call[1:])
        return state_of(deter, stoch, stats, call.latent), action

    return rssm_rollout

"""``rssm_step`` in C++: ``csrc/cpu/rssm_step/``, one call that reads every weight once, as it lies.

That is for a few rows without gradients, as in acting. With gradients a step is a sequence of one; so it is for many
rows, where packed weights pay. float16 runs on the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apv_fast import _C
from apv_fast.cpu.parts.call import address, name_of
from apv_fast.cpu.rssm_imagine import rssm_imagine
from apv_fast.cpu.rssm_observe import rssm_observe
from apv_fast.ops.op import Kernel, wants_gradients
from apv_fast.ops.rssm_step import RssmStep
from apv_fast.recurrence.imagination import as_sequence
from apv_fast.reference import rssm_step as reference
from apv_fast.types import ActorParams, Latent, RSSMParams, State, state_of

FEW = 64  # rows up to which nothing is packed: there the time is that of reading the weights


class Model(NamedTuple):
    """One model of a :class:`Filter`."""

    params: RSSMParams  # contiguous
    latent: Latent
    actions: int  # A
    embed: int  # E, what it sees of the observation
    sees_below: bool = False  # behind that, the features of the model before
    # The columns that see one-hot latents, turned: what is not zero is looked up there. None: it is multiplied.
    img_in_rows: Tensor | None = None  # [L, H], its own latents
    obs_out_rows: Tensor | None = None  # [L', H], those of the model before


class Inputs(NamedTuple):
    """What one model's step reads; contiguous."""

    deter: Tensor  # [B, D], the states' dtype, as all but embed
    stoch: Tensor  # [B, S, C] or [B, S]
    action: Tensor | None  # [B, A]
    embed: Tensor | None  # [B, E], the weights' dtype
    post_noise: Tensor | None  # [B, S, C] or [B, S], or a seed
    prior_noise: Tensor | None


class Outputs(NamedTuple):
    """What it leaves, the states' dtype; None: not asked for."""

    deter: Tensor  # [B, D]
    post_stoch: Tensor | None  # [B, S, C] or [B, S]
    post_stats: Tensor | None  # [B, S, C] or [B, 2·S]
    prior_stoch: Tensor | None
    prior_stats: Tensor | None


def _noise(noise: Tensor | None) -> tuple[int, int]:
    """Addresses of the numbers and of the seed."""
    if noise is None:
        return 0, 0
    return (noise.data_ptr(), 0) if noise.is_floating_point() else (0, noise.data_ptr())


class Filter:
    """One step of one model, or of two of which the second sees the first, and perhaps of an actor on top.

    Args:
        models: weights of one dtype, whose memory must stay where it is.
        actor: contiguous weights of that dtype, its two heads in one: see :func:`joined_heads`.
        actor_rows: the columns of its first layer that see one-hot latents, turned ``[L, U]``.
        post, prior: which distributions are wanted.
        discrete: one-hot actions.
        min_std: of the actor.
    """

    def __init__(
        self,
        models: Sequence[Model],
        actor: tuple[tuple[Tensor, ...], Tensor, Tensor] | None = None,
        *,
        actor_rows: Tensor | None = None,
        post: bool,
        prior: bool,
        discrete: bool = False,
        min_std: float = 0.0,
    ) -> None:
        self.models, self.post, self.prior, self.actor, self.actor_rows = list(models), post, prior, actor, actor_rows
        self.actions = 0
        self._step = _C.FilterStep(
            sizes=[self._sizes(model) for model in models],
            latent_min_std=[model.latent.min_std for model in models],
            weights=[self._weights(model) for model in models],
            dtype=name_of(models[0].params.gru_weight.dtype),
        )
        if actor is not None:
            trunk, weight, bias = actor
            pairs = zip(trunk[::2], trunk[1::2], strict=True)
            self.actions = len(bias) if discrete else len(bias) // 2
            self._step.add_actor(
                layers=[(w.data_ptr(), b.data_ptr(), len(b)) for w, b in pairs],
                rows=address(actor_rows),
                head=(weight.data_ptr(), bias.data_ptr(), len(bias)),
                actions=self.actions,
                one_hot=discrete,
                min_std=min_std,
            )

    @staticmethod
    def _sizes(model: Model) -> dict[str, int]:
        params, latent = model.params, model.latent
        return {
            "deter": params.img_out_weight.shape[1],
            "hidden": len(params.img_in_bias),
            "stoch": latent.stoch,
            "discrete": latent.discrete,
            "inputs": params.img_in_weight.shape[1],
            "actions": model.actions,
            "embed": model.embed,
            "sees_below": model.sees_below,
        }

    def _weights(self, model: Model) -> dict[str, int]:
        """Addresses."""
        unwanted = ("obs",) * (not self.post) + ("img_out", "img_dist") * (not self.prior)
        addresses = {name: w.data_ptr() for name, w in model.params._asdict().items() if not name.startswith(unwanted)}
        rows = {"img_in_rows": model.img_in_rows, "obs_out_rows": model.obs_out_rows}
        return addresses | {name: w.data_ptr() for name, w in rows.items() if w is not None}

    def _outputs(self, x: Inputs) -> Outputs:
        def head(wanted: bool) -> tuple[Tensor | None, Tensor | None]:
            if not wanted:
                return None, None
            if x.stoch.dim() == 3:
                return torch.empty_like(x.stoch), torch.empty_like(x.stoch)
            return torch.empty_like(x.stoch), x.stoch.new_empty(len(x.stoch), 2 * x.stoch.shape[1])

        return Outputs(torch.empty_like(x.deter), *head(self.post), *head(self.prior))

    def __call__(
        self, is_first: Tensor | None, inputs: Sequence[Inputs], action_noise: Tensor | None = None
    ) -> tuple[list[Outputs], Tensor | None]:
        """Take the step; the models' states and the action ``[B, A]``, the mode without noise."""
        outputs = [self._outputs(x) for x in inputs]
        first = inputs[0].deter
        action = None if self.actor is None else first.new_empty(len(first), self.actions)
        self._step.run(
            len(first),
            address(is_first),
            [
                (
                    *(x.deter.data_ptr(), x.stoch.data_ptr(), address(x.action), address(x.embed)),
                    *(y.deter.data_ptr(), address(y.post_stoch), address(y.post_stats), *_noise(x.post_noise)),
                    *(address(y.prior_stoch), address(y.prior_stats), *_noise(x.prior_noise)),
                )
                for x, y in zip(inputs, outputs, strict=True)
            ],
            (*_noise(action_noise), address(action)),
            torch.get_num_threads(),
        )
        return outputs, action


def joined_heads(actor: ActorParams) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """An actor's trunk, and its head or both of them as one, contiguous."""
    weight, bias = actor.out_weight, actor.out_bias
    if actor.std_weight is not None and actor.std_bias is not None:
        weight, bias = torch.cat([weight, actor.std_weight]), torch.cat([bias, actor.std_bias])
    return tuple(x.contiguous() for x in actor.trunk), weight.contiguous(), bias.contiguous()


def _forward(call: RssmStep, keep: bool) -> list[Tensor]:
    """deter, the prior's flat stoch and stats, and with an embedding the posterior's."""
    weights = RSSMParams(*(w.contiguous() for w in call.params))
    wide, narrow = call.state["deter"].dtype, weights.gru_weight.dtype
    actions = 0 if call.action is None else call.action.shape[1]
    model = Model(weights, call.latent, actions, 0 if call.embed is None else call.embed.shape[1])

    def laid_out(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if x is None else x.contiguous() if not x.is_floating_point() else x.to(dtype).contiguous()

    inputs = Inputs(
        call.state["deter"].contiguous(),
        call.state["stoch"].contiguous(),
        laid_out(call.action, wide),
        laid_out(call.embed, narrow),
        laid_out(call.post_noise, wide),
        laid_out(call.prior_noise, wide),
    )
    step = Filter([model], post=call.embed is not None, prior=True)
    ((out,), _) = step(laid_out(call.is_first, wide), [inputs])
    tensors = (out.deter, out.prior_stoch, out.prior_stats, out.post_stoch, out.post_stats)
    return [x.flatten(1) for x in tensors if x is not None]


def _fake(call: RssmStep, keep: bool) -> list[Tensor]:
    deter, latent = call.state["deter"], call.latent
    widths = (latent.stoch * (latent.discrete or 1), latent.stoch * (latent.discrete or 2))
    return [
        deter.new_empty(deter.shape),
        *(deter.new_empty(deter.shape[0], w) for w in widths * (1 if call.embed is None else 2)),
    ]


_step = Kernel("rssm_step_cpu", RssmStep, outputs=5, forward=_forward, fake=_fake)


def _as_sequence(call: RssmStep) -> tuple[State, State]:
    """A sequence of one step; differentiable."""
    noises, action = (as_sequence(call.post_noise), as_sequence(call.prior_noise)), as_sequence(call.action)
    if call.embed is None or call.is_first is None:
        prior = _only(rssm_imagine(call.params, call.state, action, 1, call.latent, noises[1]))
        return prior, prior
    seen = call.embed[:, None], call.is_first[:, None]
    post, prior = rssm_observe(call.params, *seen, action, call.state, call.latent, *noises)
    return _only(post), _only(prior)


def _only(sequence: State) -> State:
    return {key: x[:, 0] for key, x in sequence.items()}


def rssm_step(*fields: Any) -> tuple[State, State]:
    """One step; arguments and result as :func:`apv_fast.reference.rssm_step.rssm_step`, which see."""
    call = RssmStep(*fields)
    if call.params.gru_weight.dtype == torch.float16:
        return reference.rssm_step(*call)
    deter, stoch = call.state["deter"], call.state["stoch"]
    if wants_gradients(*call.params, deter, stoch, call.action, call.embed) or deter.shape[0] > FEW:
        return _as_sequence(call)
    out = _step(*call)
    prior = state_of(out[0], out[1], out[2], call.latent)
    return (prior if call.embed is None else state_of(out[0], out[3], out[4], call.latent)), prior

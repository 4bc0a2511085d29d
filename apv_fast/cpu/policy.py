"""The policy in C++: a step of filtering with one RSSM or two and the actor in one call, ``csrc/cpu/rssm_step/``.

Weights in float32 are read where they are. After every change of a weight the columns that see one-hot latents, of
which a step looks up a few, are turned once, and for products in bfloat16 all weights are cast: PyTorch counts the
changes in place of each tensor, which one step compares with the counts of the last time. Limits: whoever changes a
weight behind PyTorch's back (``x.data``, an address) must count it, by ``torch.autograd.graph.increment_version``;
submodules must not be replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from apv_fast.cpu.rssm_step import Filter, Inputs, Model, Outputs, joined_heads
from apv_fast.nn import RSSM, Actor
from apv_fast.ops.noise import sample_noise, sample_seeds, seeded
from apv_fast.types import Latent, RSSMParams, State, state_dtype, state_of

_CPU = torch.device("cpu")
_version = attrgetter("_version")
_Key = tuple[list[int], list[int]]  # of each weight, its address and PyTorch's count of its changes in place


def _rows(weight: Tensor, column: int, latent: Latent) -> Tensor | None:
    """A weight's columns from ``column`` on that see one-hot latents, turned; None: there are no one-hots."""
    width = latent.stoch * latent.discrete
    return weight[:, column : column + width].T.contiguous() if width else None


class CpuPolicy:
    """As :class:`apv_fast.agent.policy.ModulePolicy`, with the same random numbers. Threads may share one."""

    def __init__(self, models: Sequence[RSSM], actor: Actor, *, concat_embed: bool) -> None:
        self.models, self.actor, self.concat_embed = list(models), actor, concat_embed
        self._slots = [
            (module._parameters, name)
            for root in (*models, actor)
            for module in root.modules()
            for name in module._parameters
        ]
        self._cached: tuple[_Key, Filter] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cached": None}  # it holds addresses

    def _filter(self) -> Filter:
        """For the weights as they are now."""
        weights = [w for slots, name in self._slots if (w := slots[name]) is not None]
        key = list(map(Tensor.data_ptr, weights)), list(map(_version, weights))
        if self._cached is None or self._cached[0] != key:
            self._cached = key, self._make()  # at once: another thread sees the old pair or the new one
        return self._cached[1]

    @torch.no_grad()
    def _make(self) -> Filter:
        lower, upper = self.models[0], self.models[-1]
        stacked = lower is not upper
        models = []
        for model in self.models:
            params = RSSMParams(*(w.contiguous() for w in model.params()))
            below = stacked and model is upper
            embed = 0 if below and not self.concat_embed else lower.embed_dim
            img_in = _rows(params.img_in_weight, 0, model.latent)
            obs_out = _rows(params.obs_out_weight, model.deter + embed, lower.latent) if below else None
            models.append(Model(params, model.latent, model.action_dim, embed, below, img_in, obs_out))
        actor = joined_heads(self.actor.params())
        rows = _rows(actor[0][0], 0, upper.latent)
        discrete, min_std = self.actor.std is None, self.actor.min_std
        return Filter(models, actor, actor_rows=rows, post=True, prior=False, discrete=discrete, min_std=min_std)

    def __call__(
        self,
        embed: Tensor,
        is_first: Tensor,
        states: Sequence[State],
        action: Tensor,
        *,
        explore: bool,
        generator: torch.Generator | None = None,
    ) -> tuple[list[State], Tensor]:
        """See :class:`apv_fast.agent.policy.Policy`."""
        self._check(embed, is_first, states, action)
        step, dtype = self._filter(), self.models[-1].dtype
        wide, rows = state_dtype(dtype), len(embed)
        embed, action = embed.detach().to(dtype).contiguous(), action.to(wide).contiguous()
        noises = self._noises(rows, wide, generator)
        inputs = []
        for model, state, noise in zip(self.models, states, noises, strict=True):
            deter, stoch = state["deter"].to(wide).contiguous(), state["stoch"].to(wide).contiguous()
            inputs.append(Inputs(deter, stoch, action if model.action_dim else None, embed, noise, None))
        action_noise = self._action_noise(rows, step.actions, wide, generator) if explore else None
        outs, chosen = step(is_first.contiguous(), inputs, action_noise)
        assert chosen is not None
        return [self._state(model.latent, outputs) for model, outputs in zip(self.models, outs, strict=True)], chosen

    def _check(self, embed: Tensor, is_first: Tensor, states: Sequence[State], action: Tensor) -> None:
        """No op checks these arguments, and C++ reads as many numbers as the models say."""
        rows, lower, upper = len(embed), self.models[0], self.models[-1]
        wanted = [("embed", embed, (rows, lower.embed_dim)), ("is_first", is_first, (rows,))]
        if upper.action_dim:
            wanted.append(("action", action, (rows, upper.action_dim)))
        for i, (model, state) in enumerate(zip(self.models, states, strict=True)):
            classes = (model.latent.discrete,) * bool(model.latent.discrete)
            wanted.append((f"states[{i}]['deter']", state["deter"], (rows, model.deter)))
            wanted.append((f"states[{i}]['stoch']", state["stoch"], (rows, model.latent.stoch, *classes)))
        for name, x, shape in wanted:
            if x.shape != shape or not x.is_cpu:
                raise ValueError(
                    f"policy: {name} has shape {tuple(x.shape)} on {x.device}; it must be {shape} on the CPU"
                )
        if is_first.dtype != torch.bool:
            raise TypeError(f"policy: is_first has dtype {is_first.dtype}; it must be torch.bool")

    @staticmethod
    def _state(latent: Latent, outs: Outputs) -> State:
        assert outs.post_stoch is not None and outs.post_stats is not None
        if latent.discrete:
            return {"deter": outs.deter, "stoch": outs.post_stoch, "logit": outs.post_stats}
        return state_of(outs.deter, outs.post_stoch, outs.post_stats, latent)

    def _noises(self, rows: int, dtype: torch.dtype, generator: torch.Generator | None) -> list[Tensor]:
        """Each posterior's, or its seed. A prior's is drawn behind it, which nothing reads: modules draw it."""
        latents = [model.latent for model in self.models for _ in ("posterior", "prior")]
        if all(seeded(latent, dtype, _CPU) for latent in latents):
            return list(sample_seeds(len(latents), generator).unbind())[::2]
        drawn = [sample_noise(latent, rows, dtype=dtype, device=_CPU, generator=generator) for latent in latents]
        return drawn[::2]

    def _action_noise(self, rows: int, actions: int, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
        noise = torch.empty(rows, actions, dtype=dtype)
        if self.actor.std is None:
            return -noise.exponential_(generator=generator).log()
        return noise.uniform_(generator=generator)

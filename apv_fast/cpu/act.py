"""The policy in C++: a step of filtering with one RSSM or two and the actor's choice in one call, ``csrc/cpu/step.h``.

Weights in float32 are read where they are. For products in bfloat16 they are cast once after every change of a weight:
PyTorch counts the changes in place of each tensor, which one step compares with the counts of the last cast. Limits:
whoever changes a weight behind PyTorch's back (``x.data``, an address) must count it, by
``torch.autograd.graph.increment_version``; submodules must not be replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apv_fast.cpu.step import Filter, Inputs, Model, joined_heads
from apv_fast.nn import RSSM, Actor
from apv_fast.ops.rssm_arguments import MANY, sample_noise
from apv_fast.structure import RSSMParams, State, state_dtype, state_of

_Key = tuple[tuple[int, int], ...]


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
        self._made: tuple[_Key, Filter] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_made": None}  # it holds addresses

    def _filter(self) -> Filter:
        """For the weights as they are now."""
        weights = (slots[name] for slots, name in self._slots)
        key = tuple((w.data_ptr(), w._version) for w in weights if w is not None)
        if self._made is None or self._made[0] != key:
            self._made = key, self._make()  # at once: another thread sees the old pair or the new one
        return self._made[1]

    def _make(self) -> Filter:
        lower, upper = self.models[0], self.models[-1]
        stacked = lower is not upper
        models = []
        for model in self.models:
            params = RSSMParams(*(w.detach().contiguous() for w in model.params()))
            below = stacked and model is upper
            embed = 0 if below and not self.concat_embed else lower.embed_dim
            models.append(Model(params, model.latent, model.action_dim, embed, below))
        actor = joined_heads(self.actor.params())
        discrete, min_std = self.actor.std is None, self.actor.min_std
        return Filter(models, actor, post=True, prior=False, discrete=discrete, min_std=min_std)

    @torch.no_grad()
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
        step, upper = self._filter(), self.models[-1]
        wide, rows = state_dtype(upper.dtype), len(embed)
        embed, action = embed.to(upper.dtype).contiguous(), action.to(wide).contiguous()
        inputs = []
        for model, state in zip(self.models, states, strict=True):
            deter, stoch = (state[name].to(wide).contiguous() for name in ("deter", "stoch"))
            noise = self._noise(model, rows, wide, generator)
            inputs.append(Inputs(deter, stoch, action if model.action_dim else None, embed, noise, None))
        action_noise = self._action_noise(rows, step.actions, wide, generator) if explore else None
        made, chosen = step(is_first.contiguous(), inputs, action_noise)
        assert chosen is not None
        posts = []
        for model, outputs in zip(self.models, made, strict=True):
            assert outputs.post_stoch is not None and outputs.post_stats is not None
            posts.append(state_of(outputs.deter, outputs.post_stoch, outputs.post_stats, model.latent))
        return posts, chosen

    @staticmethod
    def _noise(model: RSSM, rows: int, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
        """The posterior's; then the prior's is drawn, which nothing reads, so that what follows is the same."""
        device = torch.device("cpu")
        noise = sample_noise(model.latent, rows, dtype=dtype, device=device, generator=generator)
        if noise.numel() >= MANY:  # then it takes one number of the generator
            sample_noise(model.latent, rows, dtype=dtype, device=device, generator=generator)
            return noise
        unused = torch.empty_like(noise)
        unused.exponential_(generator=generator) if model.latent.discrete else unused.normal_(generator=generator)
        return noise

    def _action_noise(self, rows: int, actions: int, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
        noise = torch.empty(rows, actions, dtype=dtype)
        if self.actor.std is None:
            return -noise.exponential_(generator=generator).log()
        return noise.uniform_(generator=generator)

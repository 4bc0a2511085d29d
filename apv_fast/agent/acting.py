"""What acts: the encoder, the RSSMs and the actor, the agent's own or a copy that stays as it was when it was taken."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from apv_fast.agent.policy import Policy
from apv_fast.backend import resolve
from apv_fast.nn import RSSM, Actor, Encoder
from apv_fast.profile import annotated
from apv_fast.types import State


@dataclass
class Memory:
    """What the agent remembers between the steps of B episodes; tensors ``[B, ...]``."""

    af_state: State
    state: State
    action: Tensor  # the last one, [B, A]

    def tensors(self) -> Iterator[Tensor]:
        """All of them, in the same order every time."""
        for state in (self.af_state, self.state):
            yield from (state[name] for name in sorted(state))
        yield self.action


class Acting:
    """Filters images and chooses actions.

    Args:
        encoder: of images.
        models: one RSSM, or an action-free one and the action-conditional one that sees its features.
        actor: reads the features of the last model.
        concat_embed: the second model sees the embedding too.
        backend: of the step behind the encoder; see :mod:`apv_fast.backend`.
    """

    def __init__(
        self, encoder: Encoder, models: Sequence[RSSM], actor: Actor, *, concat_embed: bool, backend: str
    ) -> None:
        self.encoder, self.models, self.actor = encoder, list(models), actor
        self._concat_embed, self._backend = concat_embed, backend
        self._policies: dict[Callable[..., Policy], Policy] = {}  # by what makes them; see _policy

    @annotated("act")
    @torch.no_grad()
    def __call__(
        self,
        image: Tensor,
        is_first: Tensor,
        memory: Memory | None,
        *,
        explore: bool,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Memory]:
        """See :meth:`apv_fast.agent.Agent.act`."""
        memory = self.initial(len(image)) if memory is None else memory
        states = [memory.af_state, memory.state][-len(self.models) :]
        posts, action = self._policy()(
            self.encoder(image), is_first, states, memory.action, explore=explore, generator=generator
        )
        return action, Memory(memory.af_state if len(self.models) == 1 else posts[0], posts[-1], action)

    def initial(self, batch: int) -> Memory:
        """The memory of B episodes that have not begun: zeros, in tensors of their own."""
        lower, upper = self.models[0], self.models[-1]
        zeros = self.actor.out.weight.new_zeros(batch, upper.action_dim)
        return Memory(lower.initial(batch), upper.initial(batch), zeros)

    def copy(self) -> Acting:
        """The same with weights of its own, equal to these as they are now."""
        encoder, models, actor = copy.deepcopy((self.encoder, self.models, self.actor))
        return Acting(encoder, models, actor, concat_embed=self._concat_embed, backend=self._backend)

    @torch.no_grad()
    def take(self, other: Acting) -> None:
        """Set the weights to those of ``other`` as they are now; in place, so a recorded step reads them."""
        torch._foreach_copy_(list(self.weights()), list(other.weights()), non_blocking=True)

    def weights(self) -> Iterator[Tensor]:
        """All weights and buffers, in the same order every time."""
        for module in self._modules().values():
            yield from chain(module.parameters(), module.buffers())

    def state_dict(self) -> dict[str, Any]:
        """All weights, by module."""
        return {name: module.state_dict() for name, module in self._modules().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put them back, in place."""
        for name, module in self._modules().items():
            module.load_state_dict(state[name])

    def _modules(self) -> dict[str, nn.Module]:
        models = {f"model{index}": model for index, model in enumerate(self.models)}
        return {"encoder": self.encoder, **models, "actor": self.actor}

    def _policy(self) -> Policy:
        """What the backend in force has for the step behind the encoder."""
        make = resolve("policy", self.actor.out.weight, self._backend)
        if make not in self._policies:
            self._policies[make] = make(self.models, self.actor, concat_embed=self._concat_embed)
        return self._policies[make]

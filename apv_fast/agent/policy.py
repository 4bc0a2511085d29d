"""What acts: one step of filtering, then the actor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from apv_fast.nn import RSSM, Actor, StackedRSSM
from apv_fast.types import State


class Policy(Protocol):
    """Filters with sampled posteriors and chooses actions."""

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
        """One step for B episodes.

        Args:
            embed: ``[B, E]``.
            is_first: ``[B]`` bool; where True, states and action count as zeros.
            states: of each model before the step, ``[B, ...]``.
            action: the last one, ``[B, A]``.
            explore: sample the actor, else take its mode.
            generator: random numbers for each model's posterior and prior in turn, then for the action.

        Returns:
            Posterior states of each model, and actions ``[B, A]``.
        """


class ModulePolicy:
    """The policy on modules, which call ops.

    Args:
        models: one RSSM, or an action-free one and the action-conditional one that sees its features.
        actor: reads the features of the last model.
        concat_embed: the second model sees the embedding too.
    """

    def __init__(self, models: Sequence[RSSM], actor: Actor, *, concat_embed: bool) -> None:
        self.models, self.actor = list(models), actor
        self.stack = StackedRSSM(models[0], models[1], concat_embed=concat_embed) if len(models) == 2 else None

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
        """See :class:`Policy`."""
        if self.stack is None:
            post, _ = self.models[0].obs_step(states[0], action, embed, is_first, generator=generator)
            posts = [post]
        else:
            lower, upper = states
            posts = list(self.stack.obs_step(lower, upper, action, embed, is_first, generator=generator))
        policy = self.actor(self.models[-1].feat(posts[-1]))
        return posts, policy.rsample(generator=generator) if explore else policy.mode

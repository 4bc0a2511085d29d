"""Behaviour learning in imagination: DreamerV2's actor and critic (Hafner et al. 2021, section 2.2)."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apv_fast import ops
from apv_fast.agent.world_model import PRECISIONS, Metrics, WorldModel
from apv_fast.config import FinetuneConfig
from apv_fast.nn import Actor, Critic
from apv_fast.profile import annotate
from apv_fast.types import State

Sequence = dict[str, Tensor]  # imagined: feat, action, reward, discount, weight; [H + 1, N, ...]


@dataclass
class ImaginationNoise:
    """Noise that fixes an imagined roll-out."""

    latent: Tensor  # [H, N, S, C] Gumbel, or [H, N, S] normal
    action: Tensor  # [H, N, A] uniforms (continuous) or Gumbel (discrete)


@contextlib.contextmanager
def frozen(*modules: nn.Module | None) -> Iterator[None]:
    """Inside, the modules' weights get no gradients; gradients still flow through them."""
    weights = [p for module in modules if module is not None for p in module.parameters() if p.requires_grad]
    for p in weights:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in weights:
            p.requires_grad_(True)


class Behavior(nn.Module):
    """Actor, critic and slow critic over a world model's features."""

    def __init__(self, config: FinetuneConfig, feat_dim: int, action_dim: int, *, discrete: bool) -> None:
        super().__init__()
        self.config = config.behavior
        settings, dtype = config.behavior, PRECISIONS[config.model.precision]
        self.actor = Actor(
            feat_dim,
            action_dim,
            discrete=discrete,
            layers=settings.layers,
            units=settings.units,
            min_std=settings.min_std,
            dtype=dtype,
            backend=config.backend,
        )
        self.critic = Critic(
            feat_dim, layers=settings.layers, units=settings.units, dtype=dtype, backend=config.backend
        )
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.backend = config.backend
        auto = "reinforce" if discrete else "dynamics"
        self.actor_grad = auto if settings.actor_grad == "auto" else settings.actor_grad

    def imagine(
        self, model: WorldModel, start: State, is_terminal: Tensor, noise: ImaginationNoise | None = None
    ) -> Sequence:
        """Roll out the actor from start states ``[B, T, ...]``: sequences ``[horizon + 1, B·T, ...]``.

        The first row holds the start states with a zero action; ``is_terminal [B, T]`` belongs to them.
        """
        state, states, actions = self.roll_out(model, start, noise)
        feat = model.rssm.feat({key: torch.cat([state[key][None], states[key]]) for key in ("stoch", "deter")})
        seq = {"feat": feat, "action": torch.cat([torch.zeros_like(actions[:1]), actions])}
        seq["reward"] = model.reward(feat).mean
        seq["discount"] = self._discount(model, feat, is_terminal.flatten())
        ones = torch.ones_like(seq["discount"][:1])
        seq["weight"] = torch.cat([ones, seq["discount"][:-1]]).cumprod(0)
        return seq

    def roll_out(
        self, model: WorldModel, start: State, noise: ImaginationNoise | None = None
    ) -> tuple[State, State, Tensor]:
        """The start states ``[B·T, ...]``, and the states ``[horizon, B·T, ...]`` and actions that follow them."""
        state = {key: value.detach().flatten(0, 1) for key, value in start.items()}
        states, actions = ops.rssm_rollout(
            model.rssm.params(),
            self.actor.params(),
            state,
            horizon=self.config.horizon,
            latent=model.rssm.latent,
            min_std=self.actor.min_std,
            noise=None if noise is None else noise.latent,
            action_noise=None if noise is None else noise.action,
            backend=self.backend,
        )
        return state, states, actions

    def _discount(self, model: WorldModel, feat: Tensor, is_terminal: Tensor) -> Tensor:
        """Discount factor of every imagined state, ``[H + 1, N]``."""
        if model.discount is None:
            return torch.full(feat.shape[:-1], self.config.discount, dtype=feat.dtype, device=feat.device)
        known = self.config.discount * (~is_terminal).to(feat.dtype)  # of the first state the replay knows it
        return torch.cat([known[None], model.discount(feat).mean[1:]])

    def target(self, seq: Sequence) -> Tensor:
        """λ-returns ``[H, N]`` with the slow critic's values."""
        value = self.slow_critic(seq["feat"]).mean
        return ops.lambda_return(
            seq["reward"][:-1],
            value[:-1],
            seq["discount"][:-1],
            value[-1],
            lambda_=self.config.return_lambda,
            backend=self.backend,
        )

    def actor_loss(self, seq: Sequence, target: Tensor) -> tuple[Tensor, Metrics]:
        """``−mean(sg(weight)·(objective + entropy bonus))`` with the configured gradient."""
        policy = self.actor(seq["feat"][:-2].detach())
        objective = target[1:]
        if self.actor_grad != "dynamics":
            advantage = (target[1:] - self.slow_critic(seq["feat"][:-2]).mean).detach()
            reinforce = policy.log_prob(seq["action"][1:-1]) * advantage
            mix = self.config.actor_grad_mix if self.actor_grad == "both" else 0.0
            objective = mix * target[1:] + (1 - mix) * reinforce
        entropy = policy.entropy()
        weight = seq["weight"][:-2].detach()
        loss = -(weight * (objective + self.config.entropy * entropy)).mean()
        return loss, {"actor_loss": loss.detach(), "actor_ent": entropy.detach().mean()}

    def critic_loss(self, seq: Sequence, target: Tensor) -> tuple[Tensor, Metrics]:
        """``−mean(log N(sg(target) | critic, 1)·sg(weight))``."""
        dist = self.critic(seq["feat"][:-1].detach())
        loss = -(dist.log_prob(target.detach()) * seq["weight"][:-1].detach()).mean()
        return loss, {"critic_loss": loss.detach(), "critic": dist.mean.detach().mean()}

    def losses(
        self, model: WorldModel, start: State, is_terminal: Tensor, noise: ImaginationNoise | None = None
    ) -> tuple[Tensor, Tensor, Metrics]:
        """Actor loss, critic loss and metrics from one roll-out; neither has gradients for the world model."""
        with frozen(model):
            with annotate("imagine"):
                seq = self.imagine(model, start, is_terminal, noise)
            with annotate("target"):
                target = self.target(seq)
            with annotate("actor_critic"):
                actor_loss, actor_metrics = self.actor_loss(seq, target)
                critic_loss, critic_metrics = self.critic_loss(seq, target)
        metrics = {"imag_reward": seq["reward"].detach().mean(), "imag_target": target.detach().mean()}
        return actor_loss, critic_loss, metrics | actor_metrics | critic_metrics

    @torch.no_grad()
    def update_slow(self, due: Tensor) -> None:
        """Copy the critic into the slow critic where ``due``, a bool scalar on the device, is true."""
        for slow, now in zip(self.slow_critic.parameters(), self.critic.parameters(), strict=True):
            torch.where(due, now, slow, out=slow)

"""The agent: a world model, behaviour learnt in its imagination, and the order of one update (DreamerV2, APV)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apv_fast.agent.acting import Acting, Memory
from apv_fast.agent.behavior import Behavior
from apv_fast.agent.cuda_graph import GraphedUpdate, optimizer_tensors
from apv_fast.agent.world_model import Batch, Metrics, VideoModel, WorldModel
from apv_fast.config import FinetuneConfig, OptimizerConfig, PretrainConfig
from apv_fast.nn import RSSM, Actor, MLPHead
from apv_fast.optim import KerasAdam
from apv_fast.profile import annotate
from apv_fast.run import CheckpointError, load_into


def make_optimizer(
    weights: list[nn.Parameter], config: OptimizerConfig, backend: str, copies: Mapping[Tensor, torch.dtype]
) -> KerasAdam:
    """Keras' Adam over ``weights``; ``copies`` as :func:`weights_to_copy` gives it."""
    return KerasAdam(
        weights,
        config.lr,
        eps=config.eps,
        clip=config.clip,
        weight_decay=config.weight_decay,
        backend=backend,
        copies=copies,
    )


def weights_to_copy(model: nn.Module) -> dict[Tensor, torch.dtype]:
    """The weights inside ``model`` that its modules read in another dtype, and in which.

    Not the convolutions': they are cast to another order in memory too.
    """
    parts = [part for part in model.modules() if isinstance(part, RSSM | MLPHead | Actor)]
    return {p: part.dtype for part in parts for p in part.parameters() if p.dtype != part.dtype}


class Pretrainer:
    """A video model and its optimiser.

    Args:
        config: of the run.
        device: where everything is.

    Raises:
        ConfigError: a CUDA graph was asked for and the device is no GPU.
    """

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        self.model = VideoModel(config).to(device)
        self.optimizer = make_optimizer(
            list(self.model.parameters()), config.optimizer, config.backend, weights_to_copy(self.model)
        )
        self.updates = 0
        self.run = GraphedUpdate(
            self.learn,
            self.tensors,
            device,
            config.graph,
            search=config.conv_search,
            ready=self.optimizer.refresh_copies,
        )

    def update(self, batch: Batch) -> Metrics:
        """One update from ``image [B, T, 64, 64, 3]`` and ``is_first [B, T]``, on any device.

        Returns:
            Metrics, scalars on the device; the next update may overwrite them.
        """
        metrics = self.run(batch)
        self.updates += 1
        return metrics

    def learn(self, batch: Batch) -> Metrics:
        """What an update does, all of it on the device; see :mod:`apv_fast.agent.cuda_graph`."""
        self.optimizer.zero_grad()
        with annotate("world_model_loss"):
            result = self.model.loss(batch)
        with annotate("backward"):
            result.loss.backward()
        with annotate("optimizer_step"):
            norm = self.optimizer.step()
        return {**result.metrics, "loss": result.loss.detach(), "grad_norm": norm}

    def tensors(self) -> Iterator[Tensor]:
        """All that an update changes."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        yield from optimizer_tensors(self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Weights, moments and the number of updates."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "updates": self.updates}

    def restore(self, state: Mapping[str, Any], source: Path) -> None:
        """Put a checkpoint's state back; ``source`` is its file, for errors."""
        load_into(self.model, state["model"], source=source, field="model")
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]
        self.run.forget()


class Agent:
    """Acts on images and learns from batches of experience.

    Args:
        config: of the run.
        action_dim: A.
        discrete: one-hot actions.
        device: where everything is.

    Raises:
        ConfigError: a CUDA graph was asked for and the device is no GPU.
    """

    def __init__(self, config: FinetuneConfig, action_dim: int, *, discrete: bool, device: torch.device) -> None:
        self.config, self.device, self.updates = config, device, 0
        self.model = WorldModel(config, action_dim).to(device)
        self.behavior = Behavior(config, self.model.rssm.feat_dim, action_dim, discrete=discrete).to(device)
        video: list[nn.Module] = [] if self.model.af_rssm is None else [self.model.encoder, self.model.af_rssm]
        video_weights = list(chain.from_iterable(module.parameters() for module in video))
        known = {id(p) for p in video_weights}
        rest = [p for p in self.model.parameters() if id(p) not in known]
        actor, critic = (list(part.parameters()) for part in (self.behavior.actor, self.behavior.critic))
        copies = weights_to_copy(self.model) | weights_to_copy(self.behavior)
        self.optimizers = {
            "model": make_optimizer(rest, config.optimizer, config.backend, copies),
            "actor": make_optimizer(actor, config.behavior.optimizer, config.backend, copies),
            "critic": make_optimizer(critic, config.behavior.optimizer, config.backend, copies),
        }
        if video_weights:  # with stacking, encoder and action-free RSSM have an optimiser, and a clip, of their own
            self.optimizers["video"] = make_optimizer(video_weights, config.optimizer, config.backend, copies)
        self._clock = torch.zeros((), dtype=torch.int64, device=device)  # updates, for what is decided on the device
        models = [rssm for rssm in (self.model.af_rssm, self.model.rssm) if rssm is not None]
        self.acting = Acting(
            self.model.encoder, models, self.behavior.actor, concat_embed=config.concat_embed, backend=config.backend
        )
        self.run = GraphedUpdate(
            self.learn, self.tensors, device, config.graph, search=config.conv_search, ready=self._refresh_copies
        )

    def load_pretrained(self, state: Mapping[str, Any], source: Path) -> None:
        """Start from a pre-training checkpoint's ``state``: encoder, decoder and (action-free) RSSM.

        Raises:
            CheckpointError: it is of a model of other sizes; names ``source`` and the field.
        """
        parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "rssm": {}, "decoder": {}}
        for name, weight in state["model"].items():
            part, _, rest = name.partition(".")
            if part not in parts:
                raise CheckpointError(source, f"model.{name}", "is not part of a pre-trained model")
            parts[part][rest] = weight
        load_into(self.model.encoder, parts["encoder"], source=source, field="model.encoder")
        load_into(self.model.decoder, parts["decoder"], source=source, field="model.decoder")
        rssm = self.model.rssm if self.model.af_rssm is None else self.model.af_rssm
        load_into(rssm, parts["rssm"], source=source, field="model.rssm")

    def update(self, batch: Batch) -> Metrics:
        """One update: the world model, then actor and critic in the updated model from the old posterior.

        Args:
            batch: ``image [B, T, 64, 64, 3]``, ``action [B, T, A]``, ``reward``, ``is_first`` and ``is_terminal``
                ``[B, T]``, on any device.

        Returns:
            Metrics, scalars on the device; the next update may overwrite them.
        """
        metrics = self.run(batch)
        self.updates += 1
        return metrics

    def learn(self, batch: Batch) -> Metrics:
        """What an update does, all of it on the device; see :mod:`apv_fast.agent.cuda_graph`."""
        self._freeze_video()
        with annotate("world_model_loss"):
            result = self.model.loss(batch)
        metrics = self._step(result.loss, *(name for name in ("model", "video") if name in self.optimizers))
        with annotate("behavior_losses"):
            actor_loss, critic_loss, more = self.behavior.losses(self.model, result.post, batch["is_terminal"])
        metrics |= self._step(actor_loss + critic_loss, "actor", "critic")
        self.behavior.update_slow(self._clock % self.config.behavior.slow_every == 0)
        self._clock += 1
        return result.metrics | more | metrics

    def tensors(self) -> Iterator[Tensor]:
        """All that an update changes."""
        for module in (self.model, self.behavior):
            yield from module.parameters()
            yield from module.buffers()
        for optimizer in self.optimizers.values():
            yield from optimizer_tensors(optimizer)
        yield self._clock

    def _refresh_copies(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.refresh_copies()

    def _freeze_video(self) -> None:
        """The learning rate of the pre-trained video model: 0 at first."""
        if "video" in self.optimizers and self.config.pretrained is not None and self.config.freeze_updates > 0:
            rate = self.optimizers["video"].param_groups[0]["lr"]
            rate.fill_(self.config.optimizer.lr).mul_(self._clock >= self.config.freeze_updates)

    def _step(self, loss: Tensor, *names: str) -> Metrics:
        """Backward, then a step of the named optimisers; their gradient norms."""
        for name in names:
            self.optimizers[name].zero_grad()
        with annotate("backward"):
            loss.backward()
        with annotate("optimizer_step"):
            return {f"{name}_grad_norm": self.optimizers[name].step() for name in names}

    def act(
        self,
        image: Tensor,
        is_first: Tensor,
        memory: Memory | None,
        *,
        explore: bool,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Memory]:
        """Filter one step, with sampled posteriors, and choose actions.

        Args:
            image: ``[B, 64, 64, 3]`` uint8.
            is_first: ``[B]`` bool; where True the memory is not used.
            memory: of the step before; None at the very first.
            explore: sample the actor, else take its mode.
            generator: of all random choices; None: torch's default.

        Returns:
            Actions ``[B, A]`` in [−1, 1] (or one-hot), and the memory for the next step.
        """
        return self.acting(image, is_first, memory, explore=explore, generator=generator)

    def state_dict(self) -> dict[str, Any]:
        """Everything that learning changes: weights, queue, normaliser, moments, clocks."""
        return {
            "model": self.model.state_dict(),
            "behavior": self.behavior.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "updates": self.updates,
        }

    def restore(self, state: Mapping[str, Any], source: Path) -> None:
        """Put a checkpoint's state back; ``source`` is its file, for errors."""
        load_into(self.model, state["model"], source=source, field="model")
        load_into(self.behavior, state["behavior"], source=source, field="behavior")
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.updates = state["updates"]
        self._clock.fill_(self.updates)
        self.run.forget()

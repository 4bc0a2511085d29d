"""World models and their losses: of videos (pre-training) and of a task (fine-tuning). Seo et al. 2022, section 3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from apv_fast import ops
from apv_fast.config import FinetuneConfig, KLConfig, ModelConfig, PretrainConfig
from apv_fast.nn import RSSM, Decoder, Encoder, MLPHead, StackedRSSM, StreamNorm, VideoBonus
from apv_fast.types import Noise, State

Batch = dict[str, Tensor]  # image [B,T,64,64,3] uint8, is_first [B,T] bool, ...; see apv_fast.data
Metrics = dict[str, Tensor]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Loss(NamedTuple):
    """What a world model's loss gives."""

    loss: Tensor  # scalar, differentiable
    post: State  # posterior states [B, T, ...] with gradients
    metrics: Metrics  # scalars, detached


@dataclass
class StackNoise:
    """Noise that fixes the samples of both RSSMs, see apv_fast.ops.rssm_observe."""

    af: Noise = None
    ac: Noise = None


def make_rssm(config: ModelConfig, embed_dim: int, action_dim: int, backend: str) -> RSSM:
    """An RSSM of the configured sizes."""
    return RSSM(
        embed_dim,
        action_dim,
        deter=config.deter,
        hidden=config.hidden,
        stoch=config.stoch,
        discrete=config.discrete,
        action_pad=config.action_pad,
        backend=backend,
        dtype=PRECISIONS[config.precision],
    )


def image_loss(decoder: Decoder, feat: Tensor, image: Tensor, backend: str | None = None) -> Tensor:
    """``−mean over (B, T) of Σ_pixels log N(x | x̂, 1)``, the constant included."""
    return ops.image_loss(decoder.mean(feat), image, backend=backend)


def entropy(rssm: RSSM, state: State) -> Tensor:
    """Mean entropy of the latents in nats."""
    if rssm.latent.discrete:
        log_probs = state["logit"].detach().log_softmax(-1)
        return -(log_probs.exp() * log_probs).sum((-2, -1)).mean()
    return (
        torch.distributions.Normal(state["mean"], state["std"], validate_args=False).entropy().sum(-1).mean().detach()
    )


def kl_loss(rssm: RSSM, post: State, prior: State, config: KLConfig) -> tuple[Tensor, Tensor]:
    """The configured loss (scalar) and the divergence ``[B, T]``."""
    return rssm.kl_loss(
        post,
        prior,
        balance=config.balance,
        free=config.free,
        free_avg=config.free_avg,
        forward=config.forward,
    )


class VideoModel(nn.Module):
    """The action-free model of videos: encoder, RSSM, decoder. Its three parts are what fine-tuning starts from."""

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        self.config = config
        dtype = PRECISIONS[config.model.precision]
        self.encoder = Encoder(config.model.cnn_depth, dtype=dtype, backend=config.backend)
        self.rssm = make_rssm(config.model, self.encoder.embed_dim, 0, config.backend)
        self.decoder = Decoder(self.rssm.feat_dim, config.model.cnn_depth, dtype=dtype, backend=config.backend)

    def loss(self, batch: Batch, noise: Noise = None) -> Loss:
        """``kl_scale · KL + NLL(image)`` of a batch with ``image`` and ``is_first``."""
        post, prior = self.rssm.observe(self.encoder(batch["image"]), batch["is_first"], noise=noise)
        kl, kl_value = kl_loss(self.rssm, post, prior, self.config.kl)
        image = image_loss(self.decoder, self.rssm.feat(post), batch["image"], self.config.backend)
        metrics = {"kl_loss": kl, "image_loss": image, "model_kl": kl_value.mean()}
        metrics |= {"prior_ent": entropy(self.rssm, prior), "post_ent": entropy(self.rssm, post)}
        loss = self.config.kl_scale * kl + image
        return Loss(loss, post, {name: value.detach() for name, value in metrics.items()})


class WorldModel(nn.Module):
    """The model of a task: encoder, one RSSM or two stacked, decoder, reward and perhaps discount head, video bonus.

    ``af_rssm`` is None without stacking; then the bonus, if on, reads the features of the single RSSM.
    """

    def __init__(self, config: FinetuneConfig, action_dim: int) -> None:
        super().__init__()
        self.config = config
        dtype = PRECISIONS[config.model.precision]
        self.encoder = Encoder(config.model.cnn_depth, dtype=dtype, backend=config.backend)
        embed_dim = self.encoder.embed_dim
        self.af_rssm: RSSM | None = None
        if config.stacked:
            self.af_rssm = make_rssm(config.model, embed_dim, 0, config.backend)
            embed_dim = self.af_rssm.feat_dim + config.concat_embed * embed_dim
        self.rssm = make_rssm(config.model, embed_dim, action_dim, config.backend)
        feat_dim = self.rssm.feat_dim
        self.decoder = Decoder(feat_dim, config.model.cnn_depth, dtype=dtype, backend=config.backend)
        self.reward = make_head(config, feat_dim, "normal")
        self.discount = make_head(config, feat_dim, "bernoulli") if config.discount_head else None
        self.bonus: VideoBonus | None = None
        if config.bonus:
            settings = config.video_bonus
            self.bonus = VideoBonus(
                feat_dim,
                queue_size=settings.queue_size,
                projection_dim=settings.projection_dim,
                k=settings.k,
                window=settings.window,
                reduce=settings.reduce,
                exclude_self=settings.exclude_self,
                backend=config.backend,
            )
            self.bonus_norm = StreamNorm(settings.momentum)

    @property
    def stack(self) -> StackedRSSM | None:
        """Both RSSMs as one module, or None without stacking."""
        if self.af_rssm is None:
            return None
        return StackedRSSM(self.af_rssm, self.rssm, concat_embed=self.config.concat_embed)

    def observe(self, batch: Batch, noise: StackNoise | None = None, *, sample: bool = True) -> dict[str, State]:
        """Filter a batch: "post" and "prior", stacked also "af_post" and "af_prior"."""
        noise = noise or StackNoise()
        embed = self.encoder(batch["image"])
        if self.stack is None:
            post, prior = self.rssm.observe(embed, batch["is_first"], batch["action"], sample=sample, noise=noise.ac)
            return {"post": post, "prior": prior}
        return self.stack.observe(
            embed, batch["is_first"], batch["action"], sample=sample, af_noise=noise.af, noise=noise.ac
        )

    def loss(self, batch: Batch, noise: StackNoise | None = None) -> Loss:
        """``KL + af_kl_scale·KL_af + NLL(image) + NLL(reward + β·bonus) [+ NLL(discount)]``; updates the queue."""
        states = self.observe(batch, noise)
        post, prior = states["post"], states["prior"]
        feat = self.rssm.feat(post)
        kl, kl_value = kl_loss(self.rssm, post, prior, self.config.kl)
        image = image_loss(self.decoder, feat, batch["image"], self.config.backend)
        target, metrics = self._reward_target(batch["reward"], self.rssm.feat(states.get("af_post", post)))
        reward = -self.reward(feat[:, : target.shape[1]]).log_prob(target).mean()
        loss = kl + image + reward
        metrics |= {"kl_loss": kl, "image_loss": image, "reward_loss": reward, "model_kl": kl_value.mean()}
        metrics |= {"prior_ent": entropy(self.rssm, prior), "post_ent": entropy(self.rssm, post)}
        if self.af_rssm is not None:
            af_kl, af_value = kl_loss(self.af_rssm, states["af_post"], states["af_prior"], self.config.kl)
            loss = loss + self.config.af_kl_scale * af_kl
            metrics |= {"af_kl_loss": af_kl, "af_model_kl": af_value.mean()}
        if self.discount is not None:
            continues = self.config.behavior.discount * (~batch["is_terminal"]).to(feat.dtype)
            discount = -self.discount(feat if self.config.discount_grad else feat.detach()).log_prob(continues).mean()
            loss = loss + discount
            metrics["discount_loss"] = discount
        return Loss(loss, post, {name: value.detach() for name, value in metrics.items()})

    @torch.no_grad()
    def _reward_target(self, reward: Tensor, af_feat: Tensor) -> tuple[Tensor, Metrics]:
        """What the reward head learns, ``[B, T']``: with the bonus only the steps that begin a whole window."""
        if self.bonus is None:
            return reward, {}
        bonus = self.bonus(af_feat)  # [B, T - window + 1]
        normed = self.bonus_norm(bonus)
        metrics = {"intr_mean": bonus.mean(), "intr_std": bonus.std(correction=0)}
        metrics |= {"intr_normed_mean": normed.mean(), "intr_normed_std": normed.std(correction=0)}
        return reward[:, : bonus.shape[1]] + self.config.video_bonus.beta * normed, metrics


def make_head(config: FinetuneConfig, feat_dim: int, dist: Literal["normal", "bernoulli"]) -> MLPHead:
    """A reward or discount head of the configured size."""
    size, dtype = config.behavior, PRECISIONS[config.model.precision]
    return MLPHead(feat_dim, layers=size.layers, units=size.units, dist=dist, dtype=dtype, backend=config.backend)

"""Golden comparisons of whole losses: pre-training, fine-tuning, behaviour learning; see tests/parity.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from apv_fast.agent.behavior import Behavior, ImaginationNoise
from apv_fast.agent.world_model import Batch, Loss, StackNoise, VideoModel, WorldModel
from apv_fast.config import (
    BehaviorConfig,
    FinetuneConfig,
    KLConfig,
    ModelConfig,
    PretrainConfig,
    VideoBonusConfig,
)
from apv_fast.types import State
from tests.support.official_weights import gradients, load, under
from tests.support.parity_cases import Comparison, Golden, tensor

_BATCH_KEYS = ("image", "action", "reward", "is_first", "is_terminal", "is_last")


def _batch(case: Golden) -> Batch:
    return {key: tensor(case[key]) for key in _BATCH_KEYS if key in case}


def _model_config(meta: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        deter=meta["deter"],
        hidden=meta["hidden"],
        stoch=meta["stoch"],
        discrete=meta["discrete"],
        action_pad=meta["action_pad"],
        cnn_depth=meta["cnn_depth"],
    )


def pretrain(golden: Golden, meta: dict[str, Any]) -> Iterator[Comparison]:
    """The pre-training loss, its metrics and every gradient."""
    config = PretrainConfig(
        (), Path(), model=_model_config(meta), kl=KLConfig(**meta["kl"]), kl_scale=meta["loss_scales"]["kl"]
    )
    model = VideoModel(config)
    for part in ("encoder", "rssm", "decoder"):
        load(getattr(model, part), under(golden, f"w.{part}."))
    noise = (tensor(golden["post_gumbel"]), tensor(golden["prior_gumbel"]))
    result = model.loss(_batch(golden), noise)
    result.loss.backward()
    yield "value", "loss", result.loss, golden["loss"]
    for name, value in under(golden, "metric.").items():
        yield "value", f"metric.{name}", result.metrics[name], value
    for name in ("logit", "stoch"):
        yield "value", f"post.{name}", result.post[name], golden[f"post.{name}"]
    for part in ("encoder", "rssm", "decoder"):
        for name, ours, official in gradients(getattr(model, part), under(golden, f"grad.{part}.")):
            yield "gradient", f"grad.{part}.{name}", ours, official


def finetune_config(meta: dict[str, Any]) -> FinetuneConfig:
    """The configuration that a golden fine-tuning file was made with."""
    return FinetuneConfig(
        "none",
        Path(),
        model=_model_config(meta),
        kl=KLConfig(**meta["kl"]),
        af_kl_scale=meta["loss_scales"]["af_kl"],
        concat_embed=meta["concat_embed"],
        discount_head=meta["pred_discount"],
        discount_grad=meta["pred_discount"],  # listed in grad_heads where there is one
        video_bonus=VideoBonusConfig(
            beta=meta["beta"],
            queue_size=meta["queue_size"],
            projection_dim=meta["queue_dim"],
            k=meta["k"],
            window=meta["intr_seq_length"],
            momentum=meta["intr_reward_norm"]["momentum"],
        ),
        behavior=_behavior_config(meta, meta["units"], meta["imag_horizon"]),
    )


def _behavior_config(meta: dict[str, Any], units: int, horizon: int) -> BehaviorConfig:
    return BehaviorConfig(
        horizon=horizon,
        discount=meta["discount"],
        return_lambda=meta["discount_lambda"],
        entropy=meta["actor_ent"],
        actor_grad=meta["actor_grad"],
        actor_grad_mix=meta.get("actor_grad_mix", 0.1),
        units=units,
    )


def finetune(golden: Golden, meta: dict[str, Any]) -> Iterator[Comparison]:
    """Two losses in a row, the first one's gradients, the queue, then behaviour from the second's posterior."""
    config = finetune_config(meta)
    model = WorldModel(config, meta["action"])
    parts = ("encoder", "af_rssm", "rssm", "decoder", "reward") + ("discount",) * config.discount_head
    for part in parts:
        load(getattr(model, part), under(golden, f"w.{part}."))
    assert model.bonus is not None
    model.bonus.projection.copy_(tensor(golden["w.random_projection"]))
    for step in ("step0", "step1"):
        result = yield from _finetune_step(model, under(golden, f"{step}."), step, parts)
    is_terminal = tensor(golden["step1.is_terminal"])
    yield from _behavior(model, config, golden, result.post, is_terminal, meta)


def _finetune_step(model: WorldModel, case: Golden, step: str, parts: tuple[str, ...]) -> Any:
    model.zero_grad()
    noise = StackNoise(
        af=(tensor(case["af_post_gumbel"]), tensor(case["af_prior_gumbel"])),
        ac=(tensor(case["post_gumbel"]), tensor(case["prior_gumbel"])),
    )
    result: Loss = model.loss(_batch(case), noise)
    result.loss.backward()
    yield "value", f"{step}.loss", result.loss, case["loss"]
    for name, value in under(case, "metric.").items():
        yield "value", f"{step}.metric.{name}", result.metrics[name], value
    for name, ours in result.post.items():
        yield "value", f"{step}.post.{name}", ours, case[f"post.{name}"]
    assert model.bonus is not None
    filled = int(case["queue_len"])
    yield "value", f"{step}.queue_len", model.bonus.filled, case["queue_len"]
    yield "value", f"{step}.queue", model.bonus.queue[:filled], case["queue"][:filled]
    for part in parts:
        for name, ours, official in gradients(getattr(model, part), under(case, f"grad.{part}.")):
            yield "gradient", f"{step}.grad.{part}.{name}", ours, official
    return result


def behavior(golden: Golden, meta: dict[str, Any]) -> Iterator[Comparison]:
    """Behaviour learning from given start states."""
    units, horizon = golden["w.actor.dense0.kernel"].shape[1], len(golden["behavior.target"])
    start: State = {name: tensor(array) for name, array in under(golden, "start.").items()}
    hidden = golden["w.rssm.img_in.kernel"].shape[1]
    pad = golden["w.rssm.img_in.kernel"].shape[0] - meta["stoch"] * meta["discrete"]
    sizes = {"deter": start["deter"].shape[-1], "hidden": hidden, "action_pad": pad, "cnn_depth": 1}
    config = FinetuneConfig(
        "none",
        Path(),
        stacked=False,
        bonus=False,
        model=replace(ModelConfig(stoch=meta["stoch"], discrete=meta["discrete"]), **sizes),
        discount_head=meta["pred_discount"],
        behavior=_behavior_config(meta, units, horizon),
    )
    model = WorldModel(config, meta["action"])
    for part in ("rssm", "reward") + ("discount",) * config.discount_head:
        load(getattr(model, part), under(golden, f"w.{part}."))
    yield from _behavior(model, config, golden, start, tensor(golden["is_terminal"]), meta)


def _behavior(
    model: WorldModel,
    config: FinetuneConfig,
    golden: Golden,
    start: State,
    is_terminal: torch.Tensor,
    meta: dict[str, Any],
) -> Iterator[Comparison]:
    case = under(golden, "behavior.")
    discrete = "action_gumbel" in case
    agent = Behavior(config, model.rssm.feat_dim, meta["action"], discrete=discrete)
    for name, part in (("actor", agent.actor), ("critic", agent.critic), ("target_critic", agent.slow_critic)):
        load(part, under(golden, f"w.{name}."))
    noise = ImaginationNoise(
        latent=tensor(case["gumbel"]), action=tensor(case["action_gumbel" if discrete else "action_uniform"])
    )
    with torch.no_grad():
        state, states, _ = agent.roll_out(model, start, noise)
        seq = {name: torch.cat([state[name][None], x]) for name, x in states.items()}
        seq |= agent.imagine(model, start, is_terminal, noise)
        target = agent.target(seq)
    for name, value in under(case, "seq.").items():
        yield "value", f"behavior.seq.{name}", seq[name], value
    yield "value", "behavior.target", target, case["target"]
    model.zero_grad()
    actor_loss, critic_loss, metrics = agent.losses(model, start, is_terminal, noise)
    (actor_loss + critic_loss).backward()
    assert all(p.grad is None for p in model.parameters()), "behaviour learning must not train the world model"
    for name in ("actor_loss", "critic_loss", "actor_ent"):
        ours = critic_loss if name == "critic_loss" else metrics[name]
        yield "value", f"behavior.{name}", ours, case[name]
    for name, part in (("actor", agent.actor), ("critic", agent.critic)):
        for key, ours, official in gradients(part, under(case, f"grad.{name}.")):
            yield "gradient", f"behavior.grad.{name}.{key}", ours, official

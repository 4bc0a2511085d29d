"""Defaults of the commands for kinds of tasks: the paper's two, Atari, and one for a CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from apv_fast.config.commands import CollectConfig, FinetuneConfig, PretrainConfig
from apv_fast.config.groups import BehaviorConfig, KLConfig, ModelConfig, OptimizerConfig, VideoBonusConfig, WorldConfig


@dataclass(frozen=True)
class Preset:
    """Defaults of the commands for one kind of task."""

    collect: CollectConfig
    pretrain: PretrainConfig
    finetune: FinetuneConfig


_DATA, _OUT, _ENV = (Path("data"),), Path("run"), "dmc:walker-walk"  # stand-ins: the command line must give them

_METAWORLD = Preset(
    CollectConfig(_ENV, _OUT, world=WorldConfig(time_limit=500, camera="corner")),
    PretrainConfig(_DATA, _OUT),
    FinetuneConfig(_ENV, _OUT),
)

_DMC_WORLD = WorldConfig(action_repeat=2)
_DMC = Preset(
    CollectConfig(_ENV, _OUT, world=_DMC_WORLD),
    PretrainConfig(_DATA, _OUT, length=50, kl=KLConfig(free=1.0), kl_scale=1.0, prioritize_ends=False),
    FinetuneConfig(
        _ENV,
        _OUT,
        steps=502_000,
        prefill=1000,
        batch=16,
        world=_DMC_WORLD,
        kl=KLConfig(free=1.0),
        concat_embed=True,
        video_bonus=VideoBonusConfig(beta=0.1),
        freeze_updates=0,
        prioritize_ends=False,
        eval_episodes=1,
    ),
)

_SMALL_WORLD = WorldConfig(action_repeat=2, quality="fast")
_SMALL_MODEL = ModelConfig(deter=200, hidden=200, stoch=16, discrete=16, cnn_depth=16)
_SMALL = Preset(
    replace(_DMC.collect, world=_SMALL_WORLD),
    replace(
        _DMC.pretrain,
        steps=10_000,
        batch=8,
        length=25,
        model=_SMALL_MODEL,
        validate_every=500,
        video_every=2000,
        checkpoint_every=500,
    ),
    replace(
        _DMC.finetune,
        steps=50_000,
        batch=8,
        length=25,
        world=_SMALL_WORLD,
        model=_SMALL_MODEL,
        video_bonus=VideoBonusConfig(beta=0.1, queue_size=1024),
        behavior=BehaviorConfig(units=200),
        checkpoint_every=2000,
        eval_every=5000,
        eval_episodes=3,
    ),
)

_ATARI_WORLD = WorldConfig(action_repeat=4)
_ATARI_MODEL, _ATARI_OPTIMIZER = ModelConfig(deter=600, hidden=600), OptimizerConfig(lr=2e-4)
_ATARI = Preset(
    CollectConfig(_ENV, _OUT, world=_ATARI_WORLD),
    PretrainConfig(_DATA, _OUT, length=50, model=_ATARI_MODEL, optimizer=_ATARI_OPTIMIZER),
    FinetuneConfig(
        _ENV,
        _OUT,
        batch=16,
        world=_ATARI_WORLD,
        model=_ATARI_MODEL,
        optimizer=_ATARI_OPTIMIZER,
        discount_head=True,
        eval_episodes=1,
    ),
)

PRESETS: dict[str, Preset] = {"metaworld": _METAWORLD, "dmc": _DMC, "atari": _ATARI, "small": _SMALL}

"""Presets have the paper's figures; configurations survive JSON; what is wrong is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apv_fast.config import PRESETS, ConfigError, FinetuneConfig, PretrainConfig, check, from_dict, to_dict

# The table of Seo et al.'s two setups.
FIGURES: dict[str, tuple[Any, Any]] = {  # field -> (Meta-world, DMC)
    "world.action_repeat": (1, 2),
    "world.time_limit": (500, None),
    "world.camera": ("corner", None),
    "prefill": (5000, 1000),
    "first_updates": (100, 100),
    "prioritize_ends": (True, False),
    "train_every": (5, 5),
    "batch": (50, 16),
    "length": (50, 50),
    "optimizer.lr": (3e-4, 3e-4),
    "optimizer.eps": (1e-5, 1e-5),
    "optimizer.clip": (100, 100),
    "optimizer.weight_decay": (1e-6, 1e-6),
    "behavior.optimizer.lr": (8e-5, 8e-5),
    "kl.free": (0, 1),
    "kl.balance": (0.8, 0.8),
    "concat_embed": (False, True),
    "freeze_updates": (101, 0),
    "af_kl_scale": (0, 0),
    "video_bonus.beta": (1.0, 0.1),
    "video_bonus.queue_size": (4096, 4096),
    "video_bonus.projection_dim": (128, 128),
    "video_bonus.k": (16, 16),
    "video_bonus.window": (5, 5),
    "video_bonus.momentum": (0.99, 0.99),
    "behavior.horizon": (15, 15),
    "behavior.discount": (0.99, 0.99),
    "behavior.return_lambda": (0.95, 0.95),
    "behavior.entropy": (1e-4, 1e-4),
    "behavior.slow_every": (100, 100),
    "behavior.layers": (4, 4),
    "behavior.units": (400, 400),
    "steps": (256_000, 502_000),
    "capacity": (1_000_000, 1_000_000),
    "eval_every": (10_000, 10_000),
    "eval_episodes": (10, 1),
}
PRETRAIN: dict[str, tuple[Any, Any]] = {
    "batch": (16, 16),
    "length": (25, 50),
    "kl_scale": (0.1, 1.0),
    "kl.free": (0, 1),
    "prioritize_ends": (True, False),
    "steps": (600_000, 600_000),
    "capacity": (2_000_000, 2_000_000),
    "optimizer.lr": (3e-4, 3e-4),
    "model.deter": (1024, 1024),
    "model.hidden": (1024, 1024),
    "model.stoch": (32, 32),
    "model.discrete": (32, 32),
    "model.action_pad": (50, 50),
    "model.cnn_depth": (48, 48),
}
SOURCE = Path("run/config.json")


def value(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize("column", [0, 1], ids=["metaworld", "dmc"])
def test_presets_have_the_figures_of_the_paper(column: int) -> None:
    preset = PRESETS[("metaworld", "dmc")[column]]
    assert {name: value(preset.finetune, name) for name in FIGURES} == {n: row[column] for n, row in FIGURES.items()}
    assert {name: value(preset.pretrain, name) for name in PRETRAIN} == {n: row[column] for n, row in PRETRAIN.items()}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_together(name: str) -> None:
    preset = PRESETS[name]
    check(preset.pretrain)
    check(preset.finetune)
    assert preset.pretrain.model == preset.finetune.model  # else the weights would not load
    assert preset.collect.world == preset.finetune.world


@pytest.mark.parametrize("kind", ["collect", "pretrain", "finetune"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_survives_json(name: str, kind: str) -> None:
    config = replace(getattr(PRESETS[name], kind), seed=7, out=Path("somewhere/else"))
    values = json.loads(json.dumps(to_dict(config)))
    assert from_dict(type(config), values, SOURCE) == config
    assert values["seed"] == 7 and values["out"] == "somewhere/else"


@pytest.mark.parametrize(
    ("path", "wrong", "message"),
    [
        ("batch", "many", "batch: "),
        ("model.deter", None, "model.deter: "),
        ("kl.free", "x", "kl.free: "),
        ("model.precision", "fp16", "model.precision: "),
        ("backend", "gpu", "backend: "),
    ],
)
def test_a_wrong_value_names_file_and_field(path: str, wrong: Any, message: str) -> None:
    values = to_dict(PRESETS["dmc"].finetune)
    inner = values
    *parents, last = path.split(".")
    for name in parents:
        inner = inner[name]
    inner[last] = wrong
    with pytest.raises(ConfigError) as caught:
        from_dict(FinetuneConfig, values, SOURCE)
    assert str(caught.value).startswith(f"{SOURCE}: {message}")
    assert repr(wrong) in str(caught.value)


def test_a_missing_field_is_named() -> None:
    values = to_dict(PRESETS["dmc"].pretrain)
    del values["data"]
    with pytest.raises(ConfigError, match=r"config\.json: data: "):
        from_dict(PretrainConfig, values, SOURCE)


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(ConfigError, match=r"config\.json: colour: "):
        from_dict(PretrainConfig, to_dict(PRESETS["dmc"].pretrain) | {"colour": "red"}, SOURCE)


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
@pytest.mark.parametrize(
    "name", ["steps", "batch", "length", "capacity", "log_every", "video_every", "checkpoint_every"]
)
def test_check_counts(kind: str, name: str) -> None:
    config = getattr(PRESETS["dmc"], kind)
    with pytest.raises(ConfigError, match=f"{name} is 0; it must be at least 1"):
        check(replace(config, **{name: 0}))


@pytest.mark.parametrize("name", ["train_every", "eval_every", "eval_episodes"])
def test_check_counts_of_finetuning(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is -1; it must be at least 1"):
        check(replace(PRESETS["dmc"].finetune, **{name: -1}))  # type: ignore[arg-type]


def test_check_what_belongs_together() -> None:
    config = PRESETS["dmc"].finetune
    with pytest.raises(ConfigError, match=r"length is 4; it must be at least video_bonus\.window = 5"):
        check(replace(config, length=4))
    check(replace(config, length=4, bonus=False))
    with pytest.raises(ConfigError, match=r"behavior\.horizon is 1; it must be at least 2"):
        check(replace(config, behavior=replace(config.behavior, horizon=1)))

"""The ``config.yaml`` that the official implementation leaves beside its weights, in our terms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apv_fast.config import ConfigError

SETTINGS = "config.yaml"

# Ours ← theirs, dotted where nested. What is not in the file keeps our default.
_NAMES = {
    "batch": "dataset.batch",
    "length": "dataset.length",
    "kl.free": "kl.free",
    "kl.balance": "kl.balance",
    "kl.free_avg": "kl.free_avg",
    "kl.forward": "kl.forward",
    "kl_scale": "loss_scales.kl",
    "optimizer.lr": "model_opt.lr",
    "optimizer.eps": "model_opt.eps",
    "optimizer.clip": "model_opt.clip",
    "optimizer.weight_decay": "model_opt.wd",
    "prioritize_ends": "replay.prioritize_ends",
    "capacity": "replay.capacity",
    "model.discrete": "rssm.discrete",
}

# What our model cannot be told: with another value it would compute something else.
_FIXED = {"rssm.act": "elu", "rssm.norm": "none", "rssm.std_act": "sigmoid2", "rssm.min_std": 0.1, "rssm.ensemble": 1}


def read_settings(folder: Path) -> dict[str, Any]:
    """Nested settings of a :class:`apv_fast.config.PretrainConfig`; empty where there is no ``config.yaml``.

    Raises:
        ConfigError: the file cannot be read, or says that the model is one that we do not have.
    """
    import yaml

    path = folder / SETTINGS
    if not path.is_file():
        return {}
    try:
        official = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(official, Mapping):
        raise ConfigError(f"{path} must hold settings by name, not a {type(official).__name__}")
    for name, required in _FIXED.items():
        if (value := _find(official, name, required)) != required:
            raise ConfigError(f"{path}: {name} is {value!r}; only models with {required!r} can be imported")
    settings: dict[str, Any] = {}
    for ours, theirs in _NAMES.items():
        if (value := _find(official, theirs, None)) is not None:
            _put(settings, ours, value)
    return settings


def _find(settings: Mapping[str, Any], name: str, default: Any) -> Any:
    first, _, rest = name.partition(".")
    value = settings.get(first, default)
    if not rest:
        return value
    return _find(value, rest, default) if isinstance(value, Mapping) else default


def _put(settings: dict[str, Any], name: str, value: Any) -> None:
    first, _, rest = name.partition(".")
    if rest:
        _put(settings.setdefault(first, {}), rest, value)
    else:
        settings[first] = value

"""Configurations as JSON, and whether their numbers make sense.

pydantic is imported when a configuration is written or read: a machine that only computes need not have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from apv_fast.config.commands import FinetuneConfig, PretrainConfig

Config = TypeVar("Config")


class ConfigError(ValueError):
    """A configuration cannot be used; the message names the field."""


def to_dict(config: object) -> dict[str, Any]:
    """A configuration as nested dictionaries that JSON can hold."""
    from pydantic import TypeAdapter

    result: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return result


def from_dict(kind: type[Config], values: Mapping[str, Any], source: Path) -> Config:
    """The configuration that :func:`to_dict` made ``values`` of; ``source`` is where they come from.

    Raises:
        ConfigError: a field is missing, unknown or has a wrong value; names ``source`` and the field.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        config = TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{source}: {name}: {first['msg']} (is {first['input']!r:.80})") from error
    if unknown := _unknown(values, to_dict(config)):
        raise ConfigError(f"{source}: {unknown}: is not a setting of this version; did a newer one write the file?")
    return config


def _unknown(values: Mapping[str, Any], known: Mapping[str, Any], prefix: str = "") -> str:
    """The first field of ``values``, at any depth, that ``known`` does not have; empty if there is none."""
    for name, value in values.items():
        if name not in known:
            return prefix + name
        if isinstance(value, Mapping) and (inner := _unknown(value, known[name], f"{prefix}{name}.")):
            return inner
    return ""


def check(config: PretrainConfig | FinetuneConfig) -> None:
    """See that the numbers make sense together.

    Raises:
        ConfigError: they do not; names the field.
    """
    _at_least(1, config, "steps", "batch", "length", "capacity", "log_every", "video_every", "checkpoint_every")
    _at_least(1, config.model, "deter", "hidden", "stoch", "cnn_depth", prefix="model.")
    _at_least(0, config.model, "discrete", "action_pad", prefix="model.")
    if isinstance(config, PretrainConfig):
        _at_least(1, config, "validate_every")
        _at_least(0, config, "prefetch")
        if not 0 <= config.validation < 1:
            raise ConfigError(f"validation is {config.validation}; it must be at least 0 and less than 1")
        return
    _at_least(1, config, "envs", "train_every", "eval_every", "eval_episodes")
    _at_least(0, config, "prefill", "first_updates", "freeze_updates")
    _at_least(1, config.behavior, "layers", "units", "slow_every", prefix="behavior.")
    if config.bonus and config.length < config.video_bonus.window:
        raise ConfigError(
            f"length is {config.length}; it must be at least video_bonus.window = {config.video_bonus.window}"
        )
    _at_least(2, config.behavior, "horizon", prefix="behavior.")


def _at_least(least: int, config: object, *names: str, prefix: str = "") -> None:
    for name in names:
        if (value := getattr(config, name)) < least:
            raise ConfigError(f"{prefix}{name} is {value}; it must be at least {least}")

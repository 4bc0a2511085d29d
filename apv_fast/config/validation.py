"""Whether a configuration makes sense, and the error that says it does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from apv_fast.config.commands import FinetuneConfig, PretrainConfig


class ConfigError(ValueError):
    """A configuration cannot be used; the message names the field."""


@contextmanager
def user_settings() -> Iterator[None]:
    """Inside, a plain ValueError is about what the user chose; it becomes a ConfigError, which has no traceback."""
    try:
        yield
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        raise ConfigError(str(error)) from error


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

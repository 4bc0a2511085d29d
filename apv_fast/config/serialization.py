"""Configurations as JSON, read and written.

pydantic is imported when a configuration is written or read: a machine that only computes need not have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from apv_fast.config.validation import ConfigError

Config = TypeVar("Config")


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

"""A configuration as the command line that gives it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from apv_fast.config.serialization import to_dict


def command_line(command: str, config: object, default: object) -> str:
    """``apv-fast COMMAND`` with every field of ``config`` that is not as in ``default``, fit for a shell."""
    options = _options(to_dict(config), to_dict(default), "")
    return shlex.join(["apv-fast", command, *options])


def _options(values: Mapping[str, Any], default: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _options(value, default[name], f"{prefix}{name}.")
        elif value != default[name]:
            option = f"{prefix}{name}".replace("_", "-")
            if isinstance(value, bool):
                yield f"--{option}" if value else f"--{prefix}no-{name}".replace("_", "-")
            else:
                yield f"--{option}"
                yield from (str(one) for one in value) if isinstance(value, list) else [str(value)]

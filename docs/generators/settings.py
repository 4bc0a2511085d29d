"""The settings of every command and the presets, as tables, from the dataclasses in ``apv_fast.config``."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from apv_fast.cli import COMMANDS, DEFAULT_PRESET
from apv_fast.config import PRESETS, to_dict


@dataclasses.dataclass(frozen=True)
class Row:
    """One setting as a table shows it."""

    option: str
    kind: str
    default: str
    text: str


def descriptions(config: type) -> dict[str, str]:
    """The docstring under every field of a dataclass."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0]
    assert isinstance(tree, ast.ClassDef)
    texts, field = {}, ""
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            field = node.target.id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and field:
            texts[field] = " ".join(str(node.value.value).split())
            field = ""
    return texts


def rows(config: type, *, positional: bool = False) -> list[Row]:
    """The settings of one dataclass that are values themselves; required ones may be ``positional``."""
    texts, types = descriptions(config), typing.get_type_hints(config)
    plain = [field for field in dataclasses.fields(config) if not dataclasses.is_dataclass(types[field.name])]
    return [
        Row(_option(field, positional), _kind(types[field.name]), _default(field), texts[field.name]) for field in plain
    ]


def groups(config: type) -> Iterator[tuple[str, str, type]]:
    """The settings of one dataclass that are groups: name, description and dataclass of each."""
    texts, types = descriptions(config), typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(types[field.name]):
            yield field.name, texts[field.name], typing.cast(type, types[field.name])


def commands() -> str:
    """Every command: what it does, its own settings, and which groups it has."""
    return "\n\n".join(_command(name) for name in COMMANDS)


def shared_groups() -> str:
    """The groups that commands share, a table each."""
    uses: dict[type, list[str]] = {}
    for name, command in COMMANDS.items():
        for group, _, config in _all_groups(command.config):
            uses.setdefault(config, []).append(f"`{group}` of `{name}`")
    parts = []
    for config, users in uses.items():
        title = f"### {config.__name__} {{: #{config.__name__.lower()} }}"
        text = (config.__doc__ or "").strip()
        parts.append(f"{title}\n\n{text} It is {', '.join(dict.fromkeys(users))}.\n\n{table(rows(config))}")
    return "\n\n".join(parts)


def presets() -> str:
    """What the presets set, of the commands that have them; only settings that differ between presets."""
    return "\n\n".join(_presets(name) for name, command in COMMANDS.items() if command.preset)


def table(settings: list[Row]) -> str:
    """Settings as Markdown."""
    lines = ["| option | values | default | what it does |", "|---|---|---|---|"]
    lines += [f"| `{row.option}` | {row.kind} | {row.default} | {row.text} |" for row in settings]
    return "\n".join(lines)


def _all_groups(config: type, prefix: str = "") -> Iterator[tuple[str, str, type]]:
    for name, text, inner in groups(config):
        yield prefix + name, text, inner
        yield from _all_groups(inner, f"{prefix}{name}.")


def _command(name: str) -> str:
    config = COMMANDS[name].config
    own = rows(config, positional=not COMMANDS[name].preset)
    parts = [f"### apv-fast {name} {{: #{name} }}", (config.__doc__ or "").strip()]
    if own:
        parts.append(table(own))
    inner = [
        f"`--{_dashed(group)}.…` is a [{kind.__name__}](#{kind.__name__.lower()}): {text[0].lower()}{text[1:]}"
        for group, text, kind in _all_groups(config)
    ]
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in inner)] if inner else parts)


def _presets(command: str) -> str:
    names = [DEFAULT_PRESET, *(name for name in PRESETS if name != DEFAULT_PRESET)]
    values = {name: dict(_flat(to_dict(getattr(PRESETS[name], command)))) for name in names}
    lines = [f"| `{command}` | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for option in values[DEFAULT_PRESET]:
        row = [_value(values[name][option]) for name in names]
        if len(set(row)) > 1:
            lines.append(f"| `--{_dashed(option)}` | {' | '.join(row)} |")
    return "\n".join(lines)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _option(field: dataclasses.Field[Any], positional: bool) -> str:
    if positional and _required(field):
        return field.name.upper()
    return f"--{_dashed(field.name)}"


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _kind(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return f"{_kind(arguments[0])} …"
    if arguments:  # a union with None
        return " or ".join(_kind(argument) for argument in arguments)
    names = {bool: "yes, no", int: "integer", float: "number", str: "text", Path: "path", type(None): "none"}
    return names[hint]


def _default(field: dataclasses.Field[Any]) -> str:
    return "required" if _required(field) else _value(field.default)


def _value(value: Any) -> str:
    if value is None or value in ((), []):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " ".join(f"`{one}`" for one in value)
    return f"`{value}`"

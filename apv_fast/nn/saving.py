"""Modules as files that other programs read too: a folder with ``model.safetensors`` and ``config.json``.

The safetensors file is the whole truth: its header says which class it is of and what that was made with, so that a
folder is never half old and half new. ``config.json`` says the same to people and to other programs; it is not read
back. Neither file can run code. safetensors is imported when a module is written or read.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

FORMAT = 1
WEIGHTS, DESCRIPTION = "model.safetensors", "config.json"


class SavedModuleError(ValueError):
    """A file does not hold the module that it should; the message names it and says what it holds."""


class Savable(nn.Module):
    """A module that can be written to a folder and made again from it.

    The constructor's arguments are remembered for that, but for ``backend``: where a module runs is for whoever reads
    it to say.
    """

    _classes: ClassVar[dict[str, type[Savable]]] = {}
    _arguments: dict[str, Any]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        Savable._classes[cls.__name__] = cls

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Remember what the constructor is going to get."""
        self = super().__new__(cls)
        try:
            bound = inspect.signature(cls.__init__).bind_partial(self, *args, **options)
        except TypeError:  # the constructor says it better
            return self
        _, *arguments = bound.arguments.items()
        object.__setattr__(self, "_arguments", {name: value for name, value in arguments if name != "backend"})
        return self

    def save_pretrained(self, path: Path | str) -> Path:
        """Write weights and what the module was made with into the folder ``path``, and return it.

        What was there before is replaced, or unchanged if writing fails.

        Raises:
            DiskError: the disk is full, or the folder cannot be written.
        """
        from safetensors.torch import save

        from apv_fast.atomic_file import atomic_file, disk_error

        folder = Path(path)
        text = json.dumps({"format": FORMAT, **_describe(self)}, indent=2)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        content = save(tensors, {"apv_fast": text})
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(folder, error) from error
        with atomic_file(folder / WEIGHTS) as file:
            file.write(content)
        with atomic_file(folder / DESCRIPTION) as file:
            file.write(f"{text}\n".encode())
        return folder

    @classmethod
    def from_pretrained(cls, path: Path | str, **changes: Any) -> Self:
        """The module that :meth:`save_pretrained` wrote into the folder ``path``, on the CPU.

        Args:
            path: the folder, or its ``model.safetensors``.
            changes: arguments of the constructor that are to be other than they were, ``dtype`` or ``backend``.

        Raises:
            SavedModuleError: there is no such file, it is damaged, or of another class or other sizes.
        """
        source = Path(path)
        source = source / WEIGHTS if source.is_dir() else source
        description, tensors = _read(source)
        if description["class"] != cls.__name__:
            name = description["class"]
            raise SavedModuleError(f"{source} holds a module of class {name}, not {cls.__name__}: use {name}'s own")
        module = _make(description, changes, source)
        assert isinstance(module, cls)
        _check(module, tensors, source)
        module.load_state_dict(tensors)
        return module


def _describe(module: Savable) -> dict[str, Any]:
    arguments = {name: _to_json(value) for name, value in module._arguments.items()}
    return {"class": type(module).__name__, "arguments": arguments}


def _to_json(value: Any) -> Any:
    if isinstance(value, Savable):
        return _describe(value)
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _from_json(name: str, value: Any, source: Path) -> Any:
    if isinstance(value, dict):
        return _make(value, {}, source)
    return getattr(torch, value) if name == "dtype" else value


def _make(description: dict[str, Any], changes: dict[str, Any], source: Path) -> Savable:
    """An untrained module as described."""
    try:
        kind = Savable._classes[description["class"]]
        arguments = {name: _from_json(name, value, source) for name, value in description["arguments"].items()}
        return kind(**arguments | changes)
    except SavedModuleError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SavedModuleError(f"{source}: this version cannot make the module that it describes: {error}") from error


def _read(source: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What a file says it holds, and its tensors."""
    from safetensors import SafetensorError, safe_open

    if not source.is_file():
        raise SavedModuleError(f"{source} does not exist; save_pretrained or apv-fast export write such a file")
    try:
        with safe_open(source, framework="pt") as file:
            text = (file.metadata() or {}).get("apv_fast")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (SafetensorError, OSError) as error:
        raise SavedModuleError(f"{source} cannot be read: {error}") from error
    description = json.loads(text) if text else {}
    if not {"format", "class", "arguments"} <= description.keys():
        raise SavedModuleError(f"{source} does not say which module it holds: save_pretrained has not written it")
    if description["format"] != FORMAT:
        raise SavedModuleError(f"{source} is of format {description['format']}; this version reads format {FORMAT}")
    return description, tensors


def _check(module: nn.Module, tensors: dict[str, torch.Tensor], source: Path) -> None:
    """See that the tensors are the module's, by name and shape."""
    expected = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    actual = {name: list(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | actual.keys()):
        if expected.get(name) != actual.get(name):
            raise SavedModuleError(
                f"{source}: {name} is {actual.get(name, 'missing')}; {type(module).__name__} with these arguments has "
                f"{expected.get(name, 'no such tensor')}"
            )

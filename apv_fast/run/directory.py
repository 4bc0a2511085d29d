"""The run directory: one place for everything that a job leaves behind.

``config.json`` (the full configuration), ``metrics.jsonl`` and TensorBoard's event files, ``checkpoints/``,
``videos/``, ``plots/``, ``train_episodes/``, ``eval_episodes/`` and ``data/``. A folder is made when something is put
into it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apv_fast.atomic_file import atomic_file, remove_temporaries


class RunError(ValueError):
    """A run directory cannot be used as asked; the message names it and says what to do."""


@dataclass(frozen=True)
class RunDirectory:
    """An existing run directory; :meth:`create` or :meth:`open` make one of these."""

    path: Path

    @classmethod
    def create(cls, path: Path | str, config: Mapping[str, Any]) -> RunDirectory:
        """Begin a run in ``path``, which must not exist or be empty; videos decoded for it may be in its ``data/``.

        Raises:
            RunError: there is something in it.
            DiskError: it cannot be written.
        """
        run = cls(Path(path))
        if run.path.exists() and (not run.path.is_dir() or any(path != run.data for path in run.path.iterdir())):
            raise RunError(
                f"{run.path} exists and is not empty: continue that run with --resume, "
                "choose another directory with --out, or delete it first"
            )
        run.path.mkdir(parents=True, exist_ok=True)
        with atomic_file(run.config_file) as file:
            file.write((json.dumps(config, indent=2) + "\n").encode())
        return run

    @classmethod
    def open(cls, path: Path | str, *, writer: bool = False) -> RunDirectory:
        """An existing run: to read it, or as the one ``writer`` that continues it (clears what a killed one left).

        Raises:
            RunError: ``path`` is not a run directory.
        """
        run = cls(Path(path))
        if not run.config_file.is_file():
            raise RunError(f"{run.path} is not a run directory: it has no {run.config_file.name}")
        if writer:
            remove_temporaries(run.path)
        return run

    def config(self) -> dict[str, Any]:
        """The configuration that the run was started with.

        Raises:
            RunError: ``config.json`` is damaged.
        """
        try:
            config = json.loads(self.config_file.read_text())
        except (OSError, ValueError) as error:
            raise RunError(f"{self.config_file} cannot be read: {error}") from error
        if not isinstance(config, dict):
            raise RunError(f"{self.config_file} must hold an object, not {type(config).__name__}")
        return config

    def check_config(self, config: Mapping[str, Any], *, may_change: Collection[str] = ()) -> None:
        """See that a run is continued with the configuration that it was started with.

        Args:
            config: the configuration now.
            may_change: fields (dotted where nested) that may differ, such as the number of steps.

        Raises:
            RunError: other fields differ; the message names the file and each of them.
        """
        saved, now = _flatten(self.config()), _flatten(json.loads(json.dumps(config)))
        differing = [
            f"{field} is {json.dumps(saved.get(field))} there and {json.dumps(now.get(field))} now"
            for field in sorted(saved.keys() | now.keys())
            if field not in may_change and saved.get(field) != now.get(field)
        ]
        if differing:
            raise RunError(f"{self.config_file} is of another configuration: {'; '.join(differing)}")

    @property
    def config_file(self) -> Path:
        """``config.json``."""
        return self.path / "config.json"

    @property
    def metrics_file(self) -> Path:
        """``metrics.jsonl``."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of :func:`apv_fast.run.save_checkpoint`'s files."""
        return self.path / "checkpoints"

    @property
    def videos(self) -> Path:
        """Folder of prediction videos."""
        return self.path / "videos"

    @property
    def plots(self) -> Path:
        """Folder of pictures."""
        return self.path / "plots"

    @property
    def train_episodes(self) -> Path:
        """Folder of the episodes that the agent learns from."""
        return self.path / "train_episodes"

    @property
    def data(self) -> Path:
        """Folder of the stores made of raw videos; they may be made before the run is."""
        return self.path / "data"

    @property
    def eval_episodes(self) -> Path:
        """Folder of evaluation episodes."""
        return self.path / "eval_episodes"


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat

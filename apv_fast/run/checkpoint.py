"""Checkpoints: one file each, complete or absent, the newest few kept.

A file holds ``{"format": 2, "step": …, "state": …}``, where state is nested dicts and lists of tensors, numbers and
strings. It is read with ``weights_only=True``, so that a file from elsewhere cannot run code.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import torch

from apv_fast.atomic_file import atomic_file

FORMAT = 2
_PATTERN = "step-*.pt"
_OTHER = "configuration: take the --preset and --model.* that it was made with"


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file and the field."""

    def __init__(self, source: Path | str, field: str, problem: str) -> None:
        super().__init__(f"{source}: {field}: {problem}")
        self.source, self.field, self.problem = source, field, problem


class Stateful(Protocol):
    """What :func:`load_into` restores: modules, optimisers and the like."""

    def state_dict(self) -> Mapping[str, Any]:
        """Everything that matters, as nested dicts."""
        ...

    def load_state_dict(self, state: Any, /) -> Any:
        """Put it back."""
        ...


def save_checkpoint(directory: Path, step: int, state: Mapping[str, Any], *, keep: int = 2) -> Path:
    """Write ``state`` as the checkpoint of ``step``, then delete all but the newest ``keep``.

    Raises:
        DiskError: the disk is full; the older checkpoints are all still there.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"step-{step:012d}.pt"
    with atomic_file(path) as file:
        recorder = _ErrorRecorder(file)
        try:
            torch.save({"format": FORMAT, "step": step, "state": dict(state)}, cast(BinaryIO, recorder))
        except RuntimeError as error:
            if recorder.error:  # torch's archive writer reports a failed write as one of its own errors
                raise recorder.error from error
            raise
    for old in sorted(directory.glob(_PATTERN))[:-keep]:
        if old != path:  # its number is lower than those of a run that was turned back
            old.unlink(missing_ok=True)
    return path


def latest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint of the highest step, if there is one."""
    return max(directory.glob(_PATTERN), default=None)


def load_checkpoint(path: Path, *, map_location: torch.device | str = "cpu") -> tuple[int, dict[str, Any]]:
    """Step and state of one file.

    Raises:
        CheckpointError: it is damaged, not a checkpoint, or of a format that this version does not read.
    """
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own text advises to load it without the check
        raise CheckpointError(
            path, "archive", "is damaged, or holds objects that could run code when loaded"
        ) from error
    except Exception as error:  # damage shows in the file, the zip archive or the unpickler
        raise CheckpointError(path, "archive", f"cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict) or not {"format", "step", "state"} <= content.keys():
        raise CheckpointError(path, "format", "this is not a checkpoint of apv-fast")
    if content["format"] != FORMAT:
        raise CheckpointError(path, "format", f"must be {FORMAT}, not {content['format']!r}; another version wrote it")
    return content["step"], content["state"]


def load_latest(
    directory: Path, *, map_location: torch.device | str = "cpu"
) -> tuple[Path, int, dict[str, Any]] | None:
    """File, step and state of the newest checkpoint that can be read; None if there is no file at all.

    Raises:
        CheckpointError: there are files and none can be read.
    """
    failure: CheckpointError | None = None
    for path in sorted(directory.glob(_PATTERN), reverse=True):
        try:
            return path, *load_checkpoint(path, map_location=map_location)
        except CheckpointError as error:
            warnings.warn(f"skipped a checkpoint: {error}", stacklevel=2)
            failure = error
    if failure:
        raise failure
    return None


def check_state(expected: Mapping[str, Any], actual: Mapping[str, Any], source: Path | str, field: str) -> None:
    """See that ``actual`` has the keys of ``expected``, and tensors of the same shapes, at every depth.

    Raises:
        CheckpointError: it has not; names ``source`` and the first such field, under the name ``field``.
    """
    for key in expected:
        if key not in actual:
            raise CheckpointError(source, f"{field}.{key}", f"is missing; the file is of another {_OTHER}")
    for key, value in actual.items():
        name = f"{field}.{key}"
        if key not in expected:
            raise CheckpointError(source, name, f"is not part of this configuration; the file is of another {_OTHER}")
        like = expected[key]
        if isinstance(like, Mapping) and isinstance(value, Mapping):
            check_state(like, value, source, name)
        elif _shape(like) != _shape(value):
            raise CheckpointError(
                source,
                name,
                f"must be {_describe(like)}, not {_describe(value)}; the file is of another {_OTHER}",
            )


def load_into(target: Stateful, state: Mapping[str, Any], *, source: Path | str, field: str) -> None:
    """Check ``state`` against ``target``'s own (:func:`check_state`), then load it. Nothing is loaded if it differs."""
    check_state(target.state_dict(), state, source, field)
    target.load_state_dict(state)


def rng_state() -> dict[str, Any]:
    """States of torch's global generators (CPU and every GPU), fit for a checkpoint."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Put back what :func:`rng_state` took.

    GPUs that the state does not know keep what they have: a run may be resumed on another machine.
    """
    torch.set_rng_state(state["torch"].cpu())
    for index, one in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(one.cpu(), index)


class _ErrorRecorder:
    """A file for ``torch.save`` that remembers why a write failed."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            written: int = self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        return written

    def flush(self) -> None:
        self._file.flush()


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else isinstance(value, Mapping)


def _describe(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"

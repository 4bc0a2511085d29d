"""Metrics: one JSON object a line, and the same in TensorBoard; means over updates.

A line is ``{"step": …, "time": seconds since 1970, name: value, …}``; NaN and infinities are the strings "NaN",
"Infinity" and "-Infinity", as JSON has no such numbers.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
import torch
from torch import Tensor

from apv_fast.atomic_file import atomic_file, disk_error
from apv_fast.run.gif import encode_gif


class Metrics:
    """Writes to ``directory/metrics.jsonl`` and event files beside it. A context manager.

    Args:
        directory: the run directory.
        resume_step: the checkpoint's step when a run is continued: what was logged after it is dropped, since the run
            lives through those steps again. None: begin anew.
        tensorboard: write event files too.
    """

    def __init__(self, directory: Path, *, resume_step: int | None = None, tensorboard: bool = True) -> None:
        self._path = directory / "metrics.jsonl"
        if resume_step is not None:
            _truncate(self._path, resume_step)
        self._file = self._path.open("ab", buffering=0)
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # costs a second, which reading metrics need not pay

            purge = None if resume_step is None else resume_step + 1
            self._writer = SummaryWriter(str(directory), purge_step=purge)

    def scalars(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Log numbers (anything that ``float`` takes); a line that was logged survives a kill of the process.

        Raises:
            DiskError: the disk is full.
        """
        numbers = {name: float(value) for name, value in values.items()}
        line = {"step": step, "time": round(time.time(), 3)} | {name: _encode(value) for name, value in numbers.items()}
        rest = (json.dumps(line, allow_nan=False) + "\n").encode()
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise disk_error(self._path, error) from error
        if self._writer:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)

    def video(self, step: int, name: str, frames: np.ndarray, *, fps: float = 15) -> None:
        """Show uint8 ``[T, height, width, 3]`` in TensorBoard, as an animated image."""
        if self._writer:
            from tensorboard.compat.proto.summary_pb2 import Summary

            # SummaryWriter.add_video wants moviepy for what is one message.
            height, width = frames.shape[1:3]
            encoded = io.BytesIO()
            encode_gif(encoded, frames, fps=fps)
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded.getvalue())
            self._writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def close(self) -> None:
        """Finish the files."""
        self._file.close()
        if self._writer:
            self._writer.close()

    def __enter__(self) -> Metrics:
        """This."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Finish the files."""
        self.close()


class MeanMetrics:
    """Means since they were last taken; nothing is fetched from a GPU before."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None  # float64 [number of names]
        self._count = 0

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Count the metrics of one update: always the same ones. They are copied, so they may be overwritten."""
        values = torch.stack(list(metrics.values())).double()
        self._names, self._sums = (
            tuple(metrics),
            values if self._sums is None else values + self._sums.to(values.device),
        )
        self._count += 1

    def take(self) -> dict[str, float]:
        """The means, and start anew; empty if nothing was added."""
        sums = [] if self._sums is None else self._sums.tolist()
        means = {name: value / self._count for name, value in zip(self._names, sums, strict=True)}
        self._names, self._sums, self._count = (), None, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        """What was added since."""
        sums = {} if self._sums is None else dict(zip(self._names, self._sums.unbind(), strict=True))
        return {"sums": sums, "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put it back."""
        self._names, self._count = tuple(state["sums"]), state["count"]
        self._sums = torch.stack(list(state["sums"].values())) if state["sums"] else None


def read_metrics(path: Path) -> Iterator[dict[str, float]]:
    """The lines of a ``metrics.jsonl``; the last one is left out if a crash cut it short.

    Raises:
        ValueError: another line is damaged; the message has the file and the line's number.
    """
    for _, values in _lines(path):
        yield values


def _lines(path: Path) -> Iterator[tuple[str, dict[str, float]]]:
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            values = {name: float(value) for name, value in json.loads(line).items()}
        except (ValueError, TypeError, AttributeError) as error:
            if number == len(lines):  # every complete line ends in a newline, which leaves an empty last one
                return
            raise ValueError(f"{path}: line {number} is damaged: {error}") from error
        yield line, values


def _encode(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _truncate(path: Path, step: int) -> None:
    if path.exists():
        kept = [line for line, values in _lines(path) if values["step"] <= step]
        with atomic_file(path) as file:
            file.write("".join(line + "\n" for line in kept).encode())

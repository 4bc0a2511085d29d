"""Compare the engine with tensors of the official implementation: ``python -m tests.parity DIR [--backend NAME]``.

One line a file with the worst relative error ``‖ours − official‖ / ‖official‖`` of values and of gradients; exits
non-zero if one is beyond tolerance (1e-5 and 1e-4) or a file was not compared. DIR holds files in the format of
``tests/golden/README.md``, of any sizes; what a file is shows in the names of its tensors, not in its own name. In
``official_checkpoint/`` and ``official_episodes/`` it may hold files that the official implementation wrote.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import apv_fast
from apv_fast.data import read_episode
from apv_fast.official import read_checkpoint
from tests.support import parity_cases, parity_losses

CHECKPOINT, EPISODES = "official_checkpoint", "official_episodes"
TOLERANCE = {"value": 1e-5, "gradient": 1e-4}

Golden = dict[str, np.ndarray]
Comparison = tuple[str, str, Any, Any]  # "value" or "gradient", name, ours, official

# What a file is, by a tensor that only its kind has; the first that fits counts.
KINDS: tuple[tuple[str, Callable[[Golden, dict[str, Any]], Iterable[Comparison]]], ...] = (
    ("step0.loss", parity_losses.finetune),
    ("start.deter", parity_losses.behavior),
    ("metric.image_loss", parity_losses.pretrain),
    ("mode.post.deter", parity_cases.rssm),
    ("enc.conv0.kernel", parity_cases.cnn),
    ("kl0.loss", parity_cases.kl),
    ("mag0", parity_cases.stream_norm),
    ("returns", parity_cases.lambda_return),
    ("entropy", parity_cases.actor_trunc_normal),
    ("norm0", parity_cases.optimizer),
)


@dataclass
class Report:
    """The worst of one file."""

    path: Path
    worst: dict[str, tuple[float, str]]
    compared: int = 0
    problem: str = ""

    @property
    def passed(self) -> bool:
        return not self.problem and all(error <= TOLERANCE[kind] for kind, (error, _) in self.worst.items())

    def __str__(self) -> str:
        if self.problem:
            return f"FAIL  {self.path}: not compared: {self.problem}"
        parts = [f"{kind}s {error:.1e} ({name})" for kind, (error, name) in self.worst.items()]
        return f"{'ok  ' if self.passed else 'FAIL'}  {self.path}: {self.compared} tensors; worst " + "; ".join(parts)


def relative_error(ours: Any, official: Any) -> float:
    """``‖ours − official‖ / ‖official‖`` in float64; infinite for other shapes, NaN, or something instead of zeros."""
    a = ours.detach().double().cpu() if isinstance(ours, Tensor) else torch.as_tensor(ours, dtype=torch.float64)
    b = official.detach().double().cpu() if isinstance(official, Tensor) else torch.as_tensor(official).double()
    if a.shape != b.shape:
        return float("inf")
    difference, size = (a - b).norm().item(), b.norm().item()
    if size == 0:
        return 0.0 if difference < 1e-7 else float("inf")
    return difference / size if difference == difference else float("inf")


def _read(path: Path) -> tuple[Golden, dict[str, Any]]:
    with np.load(path, allow_pickle=False) as file:
        golden = {name: file[name] for name in file.files}
    return golden, json.loads(str(golden.pop("meta", "{}")))


def _golden_file(path: Path) -> Iterable[Comparison]:
    golden, meta = _read(path)
    for key, case in KINDS:
        if key in golden:
            return case(golden, meta)
    raise ValueError("its tensors fit no known kind of golden file")


def _checkpoint(folder: Path) -> Iterable[Comparison]:
    """The weights that the official code saved give the loss of the pre-training file beside them."""
    for path in sorted(folder.parent.glob("*.npz")):
        golden, meta = _read(path)
        if "metric.image_loss" in golden:
            weights = {f"w.{name}": array for name, array in read_checkpoint(folder).items()}
            return parity_losses.pretrain(golden | weights, meta)
    raise ValueError("there is no pre-training file beside it to compare it with")


def _episode(path: Path) -> Iterable[Comparison]:
    """What our reader gives for an official episode against the file's own arrays."""
    official, _ = _read(path)
    episode = read_episode(path)
    return [("value", name, episode[name], official[name]) for name in episode if name in official]


def compare(path: Path, backend: str = "auto") -> Report:
    """Compare one golden file, one checkpoint folder or one official episode; what goes wrong is in the report."""
    report = Report(path, {})
    reader = _checkpoint if path.is_dir() else _golden_file
    if path.parent.name == EPISODES:
        reader = _episode
    try:
        torch.manual_seed(0)
        with apv_fast.use_backend(backend):
            for kind, name, ours, official in reader(path):
                report.compared += 1
                error = relative_error(ours, official)
                if error >= report.worst.get(kind, (-1.0, ""))[0]:
                    report.worst[kind] = (error, name)
        if not report.compared:
            raise ValueError("nothing in it was compared")
    except Exception as error:  # a broken file must not hide the reports of the others
        report.problem = f"{type(error).__name__}: {error}"
    return report


def golden_paths(directory: Path) -> list[Path]:
    """Everything in a folder that is to be compared."""
    checkpoint = directory / CHECKPOINT
    paths = sorted(directory.glob("*.npz")) + sorted((directory / EPISODES).glob("*.npz"))
    return [*paths, checkpoint] if checkpoint.is_dir() else paths


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, help="folder of golden .npz files")
    parser.add_argument("--backend", default="auto", help="auto, reference, cpu, triton or cuda")
    arguments = parser.parse_args()
    paths = golden_paths(arguments.directory)
    if not paths:
        print(f"{arguments.directory} has no .npz files", file=sys.stderr)
        return 1
    reports = []
    for path in paths:
        reports.append(compare(path, arguments.backend))
        print(reports[-1], flush=True)
    passed = sum(report.passed for report in reports)
    print(
        f"{passed} of {len(reports)} files agree (tolerance: values {TOLERANCE['value']}, gradients "
        f"{TOLERANCE['gradient']})"
    )
    return 0 if passed == len(reports) else 1


if __name__ == "__main__":
    sys.exit(main())

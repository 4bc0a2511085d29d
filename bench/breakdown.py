"""Where whole updates' time goes: ``python -m bench.breakdown CASE CONTESTANT...`` prints milliseconds by part as JSON.

An update runs under ``torch.profiler`` with the ranges of :mod:`apv_fast.profile`. The time of an event itself, not of
the events inside it, belongs to the innermost range around it. The backward pass of an op has no range around it but
carries the sequence number of the op's forward pass, and counts where that was.

Limits: the profiler takes a few microseconds an event, so what consists of very many small ops looks slower than it is.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent

from apv_fast.profile import ENVIRONMENT_VARIABLE
from bench.registry import FORWARD_BACKWARD, OURS, REFERENCE, Case, select

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 180  # after which a process is given up
OTHER = "other"
BACKWARD = "autograd::engine::evaluate_function"

# range -> part; a range that is not here counts where it is
PARTS = {
    "update": OTHER,
    "image_encoder": "encoder",
    "image_decoder": "decoder",
    "image_loss": "image loss",
    "rssm_observe": "scan",
    "stacked_observe": "scan",
    "kl_balance": "KL",
    "kl_balance_normal": "KL",
    "video_bonus": "bonus",
    "rssm_rollout": "imagination",
    "mlp": "heads",
    "lambda_return": "returns",
    "optimizer_step": "optimiser",
}


def run(case: Case, contestants: Sequence[str]) -> dict[str, dict[str, float]]:
    """Milliseconds of an update by contestant and part, measured in a process of its own.

    Raises:
        RuntimeError: it could not be measured; says why.
    """
    command = [sys.executable, "-m", "bench.breakdown", case.name, *contestants]
    environment = {**os.environ, ENVIRONMENT_VARIABLE: "torch", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=SECONDS
        )
    except subprocess.CalledProcessError as error:
        raise RuntimeError(error.stderr.strip().rpartition("\n")[2] or f"exit status {error.returncode}") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{case.name} took over {SECONDS} s") from None
    parts: dict[str, dict[str, float]] = json.loads(done.stdout)
    return parts


def attribute(events: Sequence[FunctionEvent]) -> dict[str, float]:
    """Milliseconds by part."""
    roots = [event for event in events if event.cpu_parent is None]
    parts: dict[int, str] = {}  # sequence number of what has a backward pass -> part
    spent: Counter[str] = Counter()
    for event, part, backward in _walk(roots, parts):
        if not backward and event.sequence_nr >= 0:
            parts[event.sequence_nr] = part  # ops without a node show the number of the next one: the last is right
        spent[part] += event.cpu_time_total - sum(child.cpu_time_total for child in event.cpu_children)
    return {part: round(micros / 1e3, 3) for part, micros in spent.items()}


def _walk(roots: Sequence[FunctionEvent], parts: Mapping[int, str]) -> Iterator[tuple[FunctionEvent, str, bool]]:
    """Every event in the order of time, its part, and whether it is in a backward pass."""
    stack = [(event, OTHER, False) for event in sorted(roots, key=_start, reverse=True)]
    while stack:
        event, part, backward = stack.pop()
        if event.name.startswith(BACKWARD):
            part, backward = parts.get(event.sequence_nr, part), True
        else:
            part = PARTS.get(event.name, part)
        yield event, part, backward
        stack += [(child, part, backward) for child in sorted(event.cpu_children, key=_start, reverse=True)]


def _start(event: FunctionEvent) -> float:
    start: float = event.time_range.start
    return start


def measure(case: Case, contestants: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of the second update of each, in this process, whose environment asks for torch's ranges."""
    torch.manual_seed(0)
    problem = case.build(torch.device("cpu"), case.dtype, **case.shape)
    parts = {}
    for name in contestants:
        update = functools.partial(problem.passes[FORWARD_BACKWARD], name)
        update()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            update()
        parts[name] = attribute(list(profiler.events() or ()))
    return parts


def main(arguments: list[str]) -> int:
    """Print the parts."""
    from apv_fast.cpu.memory import keep_freed_memory

    keep_freed_memory()
    name, *contestants = arguments
    case = next(case for case in select(name, slow=True) if case.name == name)
    print(json.dumps(measure(case, contestants)))
    return 0


def rows(cases: Sequence[Case], contestants: Mapping[str, Sequence[str]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Parts of every update on the reference and on ours, and why some are missing; ``contestants`` by case's name."""
    entries, missing = [], []
    for case in cases:
        ours = next((name for name in OURS if name in contestants.get(case.name, ())), None)
        if ours is None:
            continue
        try:
            parts = run(case, (REFERENCE, ours))
        except RuntimeError as error:
            missing.append(f"{case.name}: {error}")
            continue
        what = {"op": case.op, "dtype": case.dtype_name, "shape": dict(case.shape)}
        entries += [what | {"backend": name, "parts_ms": parts[name]} for name in (REFERENCE, ours)]
    return entries, missing


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

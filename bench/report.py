"""What a run leaves: rows (the JSON file), a table, a plot, and a description of the machine."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from apv_fast import backends
from bench import plots
from bench.registry import EAGER_FP32, PYTORCH, REFERENCE, Case

# op, backend, device, dtype, shape, pass, median_ms, p10_ms, p90_ms, runs, baseline_ratio; some have peak_mb
Row = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """All that a run leaves."""

    facts: dict[str, str]  # the machine and the versions
    rows: Sequence[Row]
    ceilings: Mapping[str, float] = field(default_factory=dict)  # of bench.ceilings
    updates: Sequence[Row] = ()  # of bench.breakdown: op, backend, dtype, shape, parts_ms


def rows(case: Case, passed: str, device: torch.device, samples: Mapping[str, Sequence[float]]) -> list[Row]:
    """One row a contestant; ``baseline_ratio`` is the reference's median over this one's."""
    result = []
    for backend, times in samples.items():
        what: Row = {"op": case.op, "backend": backend, "device": device.type, "dtype": case.dtype_name}
        what |= {"shape": dict(case.shape), "pass": passed}
        result.append(what | summarize(times, samples[REFERENCE]))
    return result


def summarize(times: Sequence[float], baseline: Sequence[float] | None) -> Row:
    """A row's figures; ``baseline_ratio`` is None without a baseline."""
    p10, median, p90 = np.percentile(times, (10, 50, 90))
    return {
        "median_ms": round(float(median), 5),
        "p10_ms": round(float(p10), 5),
        "p90_ms": round(float(p90), 5),
        "runs": len(times),
        "baseline_ratio": None if baseline is None else round(float(np.median(baseline) / median), 4),
    }


def environment(device: torch.device) -> dict[str, str]:
    """The machine and the versions that the figures are of."""
    installed = {dist.metadata["Name"]: dist.version for dist in metadata.distributions()}
    versions = [f"{name} {installed[name]}" for name in ("torch", "triton", "numpy") if name in installed]
    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "CPU": f"{_cpu_model()}, {os.cpu_count()} logical cores, load {os.getloadavg()[0]:.2f} at the start",
        "threads": str(torch.get_num_threads()),
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
    }
    if device.type == "cuda":
        facts["GPU"] = torch.cuda.get_device_name(device)
    for name, info in backends().items():
        facts[f"backend {name}"] = info.status.isa if info.available else f"not available: {info.status.reason}"
    return facts


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def best_of_pytorch(case_rows: Sequence[Row], passed: str) -> float | None:
    """The least milliseconds of PyTorch in the dtype of the case, of one pass."""
    times = [row["median_ms"] for row in case_rows if row["pass"] == passed and row["backend"] in PYTORCH]
    return min(times, default=None)


def table(case_rows: Sequence[Row]) -> Table:
    """The rows of one case, for the terminal: each held against PyTorch in the same dtype, and in float32 beside it."""
    result = Table(box=None, padding=(0, 1, 0, 0))
    for heading, width in (("pass", 16), ("backend", 13)):
        result.add_column(heading, min_width=width)
    numbers = [("median ms", 9), ("p10 - p90 ms", 17), ("runs", 4), ("x PyTorch", 9)]
    wider = any(row["backend"] == EAGER_FP32 for row in case_rows)
    for heading, width in [*numbers, ("x fp32", 6)] if wider else numbers:
        result.add_column(heading, justify="right", min_width=width)
    for row in case_rows:
        same, fp32 = best_of_pytorch(case_rows, row["pass"]), _eager_fp32(case_rows, row["pass"])
        cells = [
            row["pass"],
            row["backend"],
            f"{row['median_ms']:.4g}",
            f"{row['p10_ms']:.4g} - {row['p90_ms']:.4g}",
            str(row["runs"]),
            "" if same is None or row["backend"] == EAGER_FP32 else f"{same / row['median_ms']:.2f}",
        ]
        result.add_row(*cells, *([f"{fp32 / row['median_ms']:.2f}"] if fp32 else []))
    return result


def _eager_fp32(case_rows: Sequence[Row], passed: str) -> float | None:
    return next((row["median_ms"] for row in case_rows if (row["backend"], row["pass"]) == (EAGER_FP32, passed)), None)


def case_name(row: Row) -> str:
    """Of the case that the row is of."""
    shape = " ".join(f"{name}={size}" for name, size in row["shape"].items())
    return f"{row['op']} {shape} {row['dtype']}"


def read(path: Path) -> Results:
    """A file that :func:`write` wrote.

    Raises:
        ValueError: it is none.
    """
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise ValueError(f"{path} is no file of python -m bench --json")
    return Results(content.get("machine", {}), content["rows"], content.get("ceilings", {}), content.get("updates", ()))


def write(path: Path, results: Results) -> list[Path]:
    """The results to ``path``, the machine to a .txt and plots to .png beside it; what was written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": results.facts, "ceilings": results.ceilings, "rows": results.rows, "updates": results.updates}
    path.write_text(json.dumps(content, indent=1) + "\n")
    text = path.with_suffix(".txt")
    text.write_text("".join(f"{name}: {fact}\n" for name, fact in results.facts.items()))
    return [path, text, *(plots.draw(path, results) if results.rows else [])]

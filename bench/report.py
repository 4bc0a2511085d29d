"""What a run leaves: rows (the JSON file), a table, a plot, and a description of the machine."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from apv_fast import backends
from bench.registry import REFERENCE, Case

Row = dict[str, Any]  # op, backend, device, dtype, shape, pass, median_ms, p10_ms, p90_ms, runs, baseline_ratio


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


def table(found: Sequence[Row]) -> Table:
    """The rows of one case, for the terminal."""
    result = Table(box=None, padding=(0, 2, 0, 0))
    for heading, width in (("pass", 16), ("backend", 13)):
        result.add_column(heading, min_width=width)
    for heading, width in (("median ms", 9), ("p10 - p90 ms", 17), ("runs", 4), ("x reference", 11)):
        result.add_column(heading, justify="right", min_width=width)
    for row in found:
        result.add_row(
            row["pass"],
            row["backend"],
            f"{row['median_ms']:.4g}",
            f"{row['p10_ms']:.4g} - {row['p90_ms']:.4g}",
            str(row["runs"]),
            f"{row['baseline_ratio']:.2f}",
        )
    return result


def _shape(row: Row) -> str:
    return " ".join(f"{name}={size}" for name, size in row["shape"].items())


def write(path: Path, found: Sequence[Row], facts: Mapping[str, str]) -> list[Path]:
    """The rows to ``path``, the machine to a .txt and the plot to a .png beside it; what was written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(found), indent=1) + "\n")
    text = path.with_suffix(".txt")
    text.write_text("".join(f"{name}: {fact}\n" for name, fact in facts.items()))
    return [path, text, *([plot(path.with_suffix(".png"), found, facts)] if found else [])]


def plot(path: Path, found: Sequence[Row], facts: Mapping[str, str]) -> Path:
    """Medians as bars on a logarithmic axis, grouped by case, with whiskers from p10 to p90."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row["backend"] for row in found))}
    ticks: dict[str, float] = {}  # of the cases: the position of their first bar
    figure, axes = plt.subplots(figsize=(12, 2 + 0.32 * len(found)), layout="constrained")
    position = 0.0
    for row in found:
        label = f"{row['op']} {row['dtype']} {row['pass']}\n{_shape(row)}"
        position += 1 if label in ticks else 1.6
        ticks.setdefault(label, position)
        whisker = [[row["median_ms"] - row["p10_ms"]], [row["p90_ms"] - row["median_ms"]]]
        axes.barh(position, row["median_ms"], xerr=whisker, color=colors[row["backend"]], error_kw={"lw": 1})
        note = f"{row['median_ms']:.4g} ms, {row['baseline_ratio']:.2f}x"
        axes.text(row["p90_ms"] * 1.05, position, note, va="center", size=7)
    axes.set_yticks(list(ticks.values()), list(ticks), size=7)
    axes.set_xscale("log")
    axes.set_xlim(right=max(row["p90_ms"] for row in found) * 8)
    axes.set_ylim(position + 1, 0.6)
    axes.set_xlabel("milliseconds, median (whiskers p10 to p90); x: the reference's median over this one")
    axes.set_title(f"{facts['CPU']}, {facts['threads']} threads, {facts['date']}", size=8)
    handles = [Patch(color=color, label=name) for name, color in colors.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path

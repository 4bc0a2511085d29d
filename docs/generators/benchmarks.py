"""The benchmark page's tables, from the files that ``python -m bench --json`` left in ``bench/results``.

Each row compares like with like: the same op, sizes, pass and dtype, from the same interleaved rounds. bfloat16 rows
have eager PyTorch in float32 as a further column, where it was measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

OURS = ("cpu", "triton", "cuda", "auto")
REFERENCE, EAGER_FP32 = "reference", "eager fp32"
FACTS = ("date", "CPU", "GPU", "threads", "versions", "memory")
PASSES = {"forward": "forward", "forward_backward": "both"}
SECTIONS = {
    "Whole updates": ("pretrain_update", "finetune_update"),
    "The RSSM": ("rssm_observe", "stacked_observe", "rssm_imagine", "rssm_rollout", "rssm_step", "policy"),
    "Images and heads": ("image_encoder", "image_decoder", "image_loss", "normalize_image", "mlp"),
    "Bonus, losses, optimiser": (
        *("knn_bonus", "video_bonus", "kl_balance", "kl_balance_normal", "lambda_return", "keras_adam"),
    ),
}
Row = Mapping[str, Any]


def result_files(folder: Path) -> dict[str, dict[str, Any]]:
    """The benchmark results in ``folder``, newest first, by the file's name; other JSON files are left out."""
    contents = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"), reverse=True)}
    return {name: value for name, value in contents.items() if isinstance(value, dict) and "rows" in value}


def page(folder: Path) -> str:
    """All results, one machine after the other."""
    return "\n\n".join(part for name, result in result_files(folder).items() for part in _result(name, result))


def _result(name: str, result: Mapping[str, Any]) -> Iterator[str]:
    machine = result.get("machine", {})
    yield f"## {name.removesuffix('.json')}"
    facts = [f"{key}: {machine[key]}" for key in FACTS if key in machine]
    yield "\n".join(f"- {fact}" for fact in [*facts, f"file: `bench/results/{name}`"])
    for title, ops in SECTIONS.items():
        if lines := list(_table(result["rows"], ops)):
            yield f"### {title} {{: #{_anchor(name, title)} }}"
            yield "\n".join(lines)


def _table(rows: list[Row], ops: tuple[str, ...]) -> Iterator[str]:
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if row["op"] in ops:
            groups.setdefault((row["op"], _sizes(row["shape"]), row["dtype"], row["pass"]), {})[row["backend"]] = row
    compared = {key: group for key, group in groups.items() if REFERENCE in group and any(own in group for own in OURS)}
    if not compared:
        return
    fp32 = any(EAGER_FP32 in group for group in compared.values())
    head = ["op", "sizes", "dtype", "pass", "PyTorch", "apv-fast", "backend", "times as fast"]
    yield "| " + " | ".join([*head, *(["PyTorch in float32"] if fp32 else [])]) + " |"
    yield "|---" * (len(head) + fp32) + "|"
    for (op, sizes, dtype, passed), group in sorted(compared.items(), key=lambda item: ops.index(item[0][0])):
        ours = min((group[own] for own in OURS if own in group), key=lambda row: float(row["median_ms"]))
        reference = group[REFERENCE]["median_ms"]
        cells = [f"`{op}`", sizes, dtype, PASSES.get(passed, passed), _time(reference), _time(ours["median_ms"])]
        cells += [ours["backend"], f"{reference / ours['median_ms']:.2f}"]
        if fp32:
            cells.append(_time(group[EAGER_FP32]["median_ms"]) if EAGER_FP32 in group else "")
        yield "| " + " | ".join(cells) + " |"


def _sizes(shape: Mapping[str, int]) -> str:
    """For example "B=16 T=25 D=H=1024 S×C=32×32": symbols of the documentation where there are any."""
    sizes = dict(shape)
    parts = []
    if sizes.get("deter") == sizes.get("hidden") and "deter" in sizes:
        parts.append(f"D=H={sizes.pop('deter')}")
        del sizes["hidden"]
    if "stoch" in sizes and "discrete" in sizes:
        parts.append(f"S×C={sizes.pop('stoch')}×{sizes.pop('discrete')}")
    first = [f"{name}={sizes.pop(name)}" for name in ("B", "T") if name in sizes]
    names = {"deter": "D", "hidden": "H", "stoch": "S", "discrete": "C", "cnn_depth": "depth"}
    return " ".join([*first, *parts, *(f"{names.get(name, name)}={size}" for name, size in sizes.items())])


def _anchor(name: str, title: str) -> str:
    return f"{name.removesuffix('.json')}-{title}".lower().replace(" ", "-").replace(",", "")


def _time(ms: float) -> str:
    if ms >= 1000:
        return f"{ms / 1000:.3g} s"
    return f"{ms:.3g} ms" if ms >= 0.1 else f"{1000 * ms:.3g} µs"

"""The pages hold together: links, the length of DESIGN.md, public names, the table of backends, benchmarks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import apv_fast
from apv_fast import backends, nn, ops
from docs.generators import benchmarks
from docs.generators.pages import ROOT, documents, links

ALL = [*documents(), *sorted((ROOT / "docs/notes").glob("*.md"))]


@pytest.mark.parametrize("page", ALL, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = [link for link in links(page) if not (page.parent / link).exists()]
    assert not broken


def test_design_is_short_and_has_no_measurements() -> None:
    text = (ROOT / "DESIGN.md").read_text()
    assert len(text.splitlines()) <= 300
    assert not re.findall(r"\d\s?(?:ms|µs|GFLOP|GB/s|MB)\b", text)


@pytest.mark.parametrize(("page", "module"), [("nn", nn), ("ops", ops), ("apv_fast", apv_fast)])
def test_public_names_are_in_the_reference(page: str, module: object) -> None:
    text = (ROOT / f"docs/api/{page}.md").read_text()
    names = set(getattr(module, "__all__")) - {"nn", "ops", "__version__"}  # noqa: B009
    prefix = re.escape("apv_fast" if page == "apv_fast" else f"apv_fast.{page}")
    shown = {*re.findall(rf"{prefix}\.(\w+)\b", text), *re.findall(r"(?m)^::: apv_fast\.(?:\w+\.)*(\w+)$", text)}
    assert not names - shown


def test_the_table_of_backends_is_that_of_the_code() -> None:
    text = (ROOT / "docs/backends.md").read_text().split("## What has which op")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    known = {op for backend in backends().values() for op in backend.ops}
    shown = set()
    for first, *cells in rows:
        names = re.findall(r"`(\w+)`", first)
        shown.update(names)
        for backend, cell in zip(("reference", "cpu", "triton", "cuda"), [*cells, "", ""], strict=False):
            for op in names:
                assert (cell.strip(" |") != "") == (op in backends()[backend].ops), (op, backend)
    assert shown == known


def test_the_benchmark_page_compares_like_with_like(tmp_path: Path) -> None:
    row = {"op": "mlp", "device": "cpu", "shape": {"N": 4}, "pass": "forward"}
    rows = [
        {**row, "backend": "reference", "dtype": "float32", "median_ms": 8.0},
        {**row, "backend": "reference", "dtype": "bfloat16", "median_ms": 3.0},
        {**row, "backend": "cpu", "dtype": "bfloat16", "median_ms": 1.5},
        {**row, "backend": "eager fp32", "dtype": "bfloat16", "median_ms": 9.0},
    ]
    (tmp_path / "one.json").write_text(json.dumps({"machine": {"CPU": "a CPU"}, "rows": rows}))
    (tmp_path / "other.json").write_text(json.dumps({"experiment": "no benchmark"}))
    page = benchmarks.page(tmp_path)
    assert "| `mlp` | N=4 | bfloat16 | forward | 3 ms | 1.5 ms | cpu | 2.00 | 9 ms |" in page
    assert "float32 | forward" not in page  # ours was not measured there
    assert "other" not in page


def test_every_result_file_is_on_the_benchmark_page() -> None:
    folder = ROOT / "bench/results"
    page = benchmarks.page(folder)
    for name, result in benchmarks.result_files(folder).items():
        assert f"`bench/results/{name}`" in page
        measured = {row["op"] for row in result["rows"] if row["backend"] in benchmarks.OURS}
        assert not {op for op in measured if f"`{op}` |" not in page} - {"observe_sweep"}

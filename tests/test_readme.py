"""What the README says is so: its code runs, its figures are those of a results file, its tables those of the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from apv_fast.backend import IMPLEMENTATIONS

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) <= 150
    assert max(len(line) for line in TEXT.splitlines() if not line.startswith(("|", "!["))) <= 120


def test_the_code_trains_an_actor() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    before, after = code.split("loss.backward()\n")
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(before, names)
    old = [weight.detach().clone() for weight in names["actor"].parameters()]
    assert names["dream"]["deter"].shape[:2] == (15, 40) and names["loss"].isfinite()
    exec("loss.backward()\n" + after, names)
    gradients = [weight.grad for weight in names["actor"].parameters()]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    assert not any(torch.equal(x, y) for x, y in zip(old, names["actor"].parameters(), strict=True))


def test_the_results_are_those_of_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    targets = pytest.importorskip("bench.targets", reason="bench/ is not installed; it runs from a checkout")
    command, table = re.findall(r"<!-- python -m bench\.targets (.*?) -->\n(.*?)<!-- end -->", TEXT, re.DOTALL)[0]
    *options, name = command.split()
    assert targets.main([*options, str(ROOT / name)]) == 0
    assert capsys.readouterr().out == table
    assert table.count("\n") == 2 + 5 and "not measured" not in table


def test_the_backends_are_those_of_the_table() -> None:
    rows = re.findall(r"^\| (`.*)\|$", TEXT, re.MULTILINE)
    told = {}
    for row in rows:
        first, *cells = (cell.strip() for cell in row.split("|"))
        for op in re.findall(r"`(\w+)`", first):
            told[op] = {name for name, cell in zip(("reference", "cpu", "triton", "cuda"), cells, strict=True) if cell}
    assert told == {op: set(row) for op, row in IMPLEMENTATIONS.items()}


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", TEXT):
        if not target.startswith("http") and not (target.startswith("docs/") and not (ROOT / "docs").is_dir()):
            assert (ROOT / target).is_file(), target

"""The glossary has every metric that training logs, and none that it does not: both commands run at a tiny size."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from apv_fast import cli
from apv_fast.run import read_metrics
from docs.generators.pages import ROOT, blocks

MODEL = "--model.deter 8 --model.hidden 8 --model.stoch 2 --model.discrete 4 --model.cnn-depth 2"
TINY = f"--preset small --batch 2 --length 6 --log-every 1 {MODEL}"
BEHAVIOR = "--behavior.units 8 --behavior.layers 1 --behavior.horizon 3"


def glossary() -> set[str]:
    """The names in the first column of the tables under "Every metric"."""
    section = (ROOT / "docs/runs.md").read_text().split("## Every metric")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_every_metric_is_in_the_glossary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = (block for block in blocks(ROOT / "docs/environments.md", "python") if block.title)
    (tmp_path / block.title).write_text(block.text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_envs", raising=False)
    _run("finetune --env gym:my_envs:Drift-v0 --out first --steps 44 --prefill 40 --eval-every 40 --eval-episodes 1 "
         f"--train-every 2 --first-updates 1 --discount-head --no-stacked {BEHAVIOR} {TINY}")  # fmt: skip
    _run(f"pretrain --data first/train_episodes --out videos --steps 2 --validation 0.5 {TINY}")
    _run("finetune --env gym:my_envs:Drift-v0 --out second --steps 44 --prefill 40 --eval-every 40 --eval-episodes 1 "
         f"--train-every 2 --first-updates 1 --pretrained videos {BEHAVIOR} {TINY}")  # fmt: skip
    files = [tmp_path / run / "metrics.jsonl" for run in ("first", "videos", "second")]
    logged = {name for file in files for line in read_metrics(file) for name in line}
    assert {"eval_success", "val_loss", "af_kl_loss", "discount_loss"} <= logged
    assert logged == glossary()


def _run(line: str) -> None:
    assert cli.main(line.split()) == 0, line

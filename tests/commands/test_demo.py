"""The demo: its path, what it prints, and that it fails where nothing was learnt."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from apv_fast.cli import main
from apv_fast.commands import demo

TINY = replace(demo.QUICK, videos=1, pretrain_updates=2, prefill=50, steps=60, episodes=1)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "QUICK", TINY)
    monkeypatch.setattr(demo, "FULL", TINY)
    monkeypatch.setattr(demo, "WORLD", replace(demo.WORLD, time_limit=100))
    monkeypatch.setattr(demo, "MODEL", replace(demo.MODEL, deter=8, hidden=8, stoch=2, discrete=4, cnn_depth=2))


def _scores(random: float, after: float) -> dict[str, float]:
    return {"random_return": random, "eval_return": after}


def test_quick_demo_goes_all_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--quick", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "This takes under 2 minutes" in printed.splitlines()[0]
    files = [word for line in printed.splitlines() for word in line.split() if word.endswith((".png", ".gif"))]
    assert len(files) == 4, printed
    for file in files:
        assert Path(file).stat().st_size > 1000, file
    assert "random " in printed.splitlines()[-1] and "after " in printed.splitlines()[-1]
    # A second demo replaces the first; a folder of something else is not touched.
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    assert main(["demo", "--quick", "--out", str(tmp_path / "thesis")]) == 1
    assert "choose another directory with --out" in capsys.readouterr().err
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


@pytest.mark.thorough
@pytest.mark.parametrize(("after", "status"), [(100 * demo.MARGIN + 1, 0), (100 * demo.MARGIN - 1, 1)])
def test_full_demo_fails_where_nothing_was_learnt(
    after: float, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "evaluate_run", lambda config: _scores(100.0, after))
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--precision", "bf16"]) == status
    for run in ("pretrain", "finetune"):
        assert json.loads((out / run / "config.json").read_text())["model"]["precision"] == "bf16"
    assert ("LEARNING FAILED" in capsys.readouterr().out) == bool(status)

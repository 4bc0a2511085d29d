"""The benchmark suite: what it writes, that contestants take turns, that every op has a case."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from apv_fast.backend import IMPLEMENTATIONS, probe

pytest.importorskip("bench", reason="bench/ is not installed; it runs from a checkout")
from bench import timing
from bench.__main__ import main
from bench.registry import contestants, select

CPU = torch.device("cpu")
FIELDS = [
    "op",
    "backend",
    "device",
    "dtype",
    "shape",
    "pass",
    "median_ms",
    "p10_ms",
    "p90_ms",
    "runs",
    "baseline_ratio",
]


def test_json_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "made" / "rows.json"
    assert main(["--only", "knn_bonus Q=16 ", "--seconds", "0.01", "--device", "cpu", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert {"reference", "torch"} <= {row["backend"] for row in rows}
    for row in rows:
        assert list(row) == FIELDS
        assert (row["op"], row["device"], row["dtype"], row["pass"]) == ("knn_bonus", "cpu", "float32", "forward")
        assert row["shape"] == {"Q": 16, "N": 4096, "d": 128, "k": 16}
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["runs"] >= timing.MIN_ROUNDS
        reference = next(row for row in rows if row["backend"] == "reference")
        assert row["baseline_ratio"] == pytest.approx(reference["median_ms"] / row["median_ms"], rel=1e-3)
    assert path.with_suffix(".png").stat().st_size > 1000
    assert "threads: " in path.with_suffix(".txt").read_text()
    assert "knn_bonus Q=16" in capsys.readouterr().out


def test_gradients_are_timed() -> None:
    case = select("lambda_return H=15 N=400 ")[0]
    problem = case.build(CPU, case.dtype, **case.shape)
    assert set(problem.passes) == {"forward", "forward_backward"}
    outputs = problem.passes["forward"]("reference")
    assert isinstance(outputs, list) and not outputs[0].requires_grad
    gradients = problem.passes["forward_backward"]("reference")
    assert isinstance(gradients, tuple) and [tuple(g.shape) for g in gradients] == [(15, 400)] * 3 + [(400,)]


def test_contestants_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARM_UP_SECONDS", 0.0)
    calls: list[str] = []
    works = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    samples = timing.interleaved(works, CPU, seconds=0.0)
    assert {name: len(times) for name, times in samples.items()} == dict.fromkeys("abc", timing.MIN_ROUNDS)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc" + "bca"  # warm-up, then five rounds


def test_every_op_has_a_case() -> None:
    assert set(IMPLEMENTATIONS) <= {case.op for case in select()}


def test_names_are_unique() -> None:
    names = [case.name for case in select(slow=True)]
    assert len(set(names)) == len(names)


def test_interpreted_kernels_are_not_timed() -> None:
    if probe("triton").isa != "interpreter":
        pytest.skip("Triton is missing or compiles kernels here")
    names, left_out = contestants(select("lambda_return*")[0], CPU)
    assert "triton" not in names
    assert "unset it" in left_out["triton"]


def test_no_match_says_how_to_find_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "no such op"]) == 2
    assert "--list" in capsys.readouterr().out

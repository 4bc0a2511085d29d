"""What ``python -m bench.device`` makes of its figures: targets, the table, the file, the forecast."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bench", reason="bench/ is not installed; it runs from a checkout")
from bench.cost.machine import MACHINES
from bench.gpu import forecast, stages, suite, table, targets
from bench.gpu.ledger import BUDGETS, SECONDS, SECTIONS, Clock, Ledger


def row(op: str, backend: str, ms: float, passed: str = "forward_backward", **more: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "op": op,
        "backend": backend,
        "dtype": "bfloat16",
        "shape": {"B": 16, "T": 50},
        "pass": passed,
    }
    fields |= {"median_ms": ms, "p10_ms": ms, "p90_ms": ms, "runs": 9, "baseline_ratio": None, "cache": "cold"}
    return fields | {"peak_mb": None} | more


def verdicts(rows: list[dict[str, Any]]) -> dict[str, tuple[str, str, bool | None]]:
    return {v.what: (v.limit, v.measured, v.met) for v in targets.verdicts(rows)}


def test_targets_are_those_of_the_issue() -> None:
    assert {what: limit for what, (limit, *_) in verdicts([]).items()} == {
        "observe B=16 forward": "<= 0.6 ms",
        "observe B=16 forward+backward": "<= 1.8 ms",
        "observe B=16 over the best rival": ">= 1.5 x",
        "observe B=50 forward": "<= 1.0 ms",
        "observe B=50 forward+backward": "<= 3.0 ms",
        "stacked B=16 over two scans": ">= 1.5 x",
        "stacked B=50 over two scans": ">= 1.5 x",
        "kNN 2300 x 4096 x 128": "<= 0.08 ms",
        "pre-training update B16 T25": "<= 4.0 ms",
        "Meta-world update B50 T50": "<= 20.0 ms",
        "Meta-world update over eager": ">= 8 x",
        "Meta-world update over the best rival": ">= 2 x",
        "Meta-world update over ContextWM's": ">= 8 x",
        "pre-training peak memory of eager's": "<= 60%",
        "Meta-world peak memory of eager's": "<= 60%",
    }
    assert {(measured, met) for _, measured, met in verdicts([]).values()} == {("not measured", None)}


def test_targets_are_held_against_the_fastest_of_ours() -> None:
    rows = [
        row("rssm_observe", "cuda", 0.5, "forward"),
        row("rssm_observe", "triton", 0.7, "forward"),
        row("rssm_observe", "triton, a launch a phase", 0.1, "forward"),  # no claim is about it
        row("rssm_observe", "cuda", 1.7),
        row("rssm_observe", "reference", 20.0),
        row("rssm_observe", "torch.compile in a graph", 4.0, beside_ms={"cuda": 2.0, "triton": 2.5}),
        row("rssm_observe", "scan in a graph", 3.0, beside_ms={"cuda": 2.5, "triton": 2.0}),  # 1.5 in its own rounds
        row("rssm_observe", "cuDNN LSTM float16", 0.1),  # a yardstick
    ]
    paper = {"B": 50, "T": 50}
    rows += [row("finetune_update", "auto", 30.0, peak_mb=500.0, shape=paper)]
    rows += [row("finetune_update", "reference", 300.0, peak_mb=1000.0, shape=paper)]
    rows += [row("finetune_update", "compiled and recorded", 45.0, shape=paper)]
    rows += [row("finetune_update", "ContextWM, its own update", 270.0, shape=paper)]
    rows += [row("pretrain_update", "auto, without a graph", 3.0, shape={"B": 16, "T": 25})]  # no graph can be recorded
    outcomes = {what: (measured, met) for what, (_, measured, met) in verdicts(rows).items()}
    assert outcomes["observe B=16 forward"] == ("0.500 ms", True)
    assert outcomes["observe B=16 forward+backward"] == ("1.700 ms", True)
    assert outcomes["observe B=16 over the best rival"] == ("1.50 x", True)
    assert outcomes["observe B=50 forward"] == ("not measured", None)
    assert outcomes["Meta-world update B50 T50"] == ("30.000 ms", False)
    assert outcomes["Meta-world update over eager"] == ("10.00 x", True)
    assert outcomes["Meta-world update over the best rival"] == ("1.50 x", False)
    assert outcomes["Meta-world update over ContextWM's"] == ("9.00 x", True)
    assert outcomes["Meta-world peak memory of eager's"] == ("50% (500 MB)", True)
    assert outcomes["pre-training update B16 T25"] == ("3.000 ms", True)
    assert outcomes["pre-training peak memory of eager's"] == ("not measured", None)


def test_a_stack_is_held_against_two_scans_of_its_own_backend() -> None:
    """CUDA's stack is two scans, so a faster backend's scans must not make a ratio of it, nor of Triton's."""
    rows = [row("stacked_observe", "cuda", 1.0), row("stacked_observe", "triton", 2.0)]
    rows += [row("stacked_observe", "two scans, cuda", 1.0), row("stacked_observe", "two scans, triton", 3.2)]
    assert verdicts(rows)["stacked B=16 over two scans"][1:] == ("1.60 x (triton)", True)
    assert verdicts(rows[:3])["stacked B=16 over two scans"][1:] == ("1.00 x (cuda)", False)
    assert verdicts(rows[1:3])["stacked B=16 over two scans"][1:] == ("not measured", None)


def test_who_is_timed_when() -> None:
    core = ("cuda", "triton", "auto", "auto, without a graph", "reference", "two scans, cuda")
    assert all(map(targets.is_core, core))
    others = ("triton, a launch a phase", "reference in a graph", "torch.compile in a graph", "cuDNN LSTM float16")
    assert not any(map(targets.is_core, others))
    assert targets.is_ours("triton, a launch a phase") and not targets.is_ours("reference")
    assert [name for name in others if targets.is_rival(name)] == ["reference in a graph", "torch.compile in a graph"]
    sizes = {"B": 16, "T": 50}
    assert targets.about("rssm_observe", sizes, "bfloat16") == (True, True)
    assert targets.about("rssm_observe", {"B": 50, "T": 50}, "bfloat16") == (True, False)
    assert targets.about("finetune_update", {"B": 50, "T": 50}, "bfloat16") == (True, True)
    assert targets.about("rssm_observe", sizes, "float32") == (False, False)


def report(**more: Any) -> dict[str, Any]:
    ledger = Ledger(None, {"GPU": "NVIDIA H100"}, Clock())
    return ledger.report | more


def test_table_names_what_was_measured_and_what_was_not() -> None:
    shape = {"B": 16, "T": 50, "E": 1536, "A": 0, "deter": 1024, "hidden": 1024, "stoch": 32, "discrete": 32}
    rows = [
        row("rssm_observe", "cuda", 0.866, "forward", shape=shape),
        row("rssm_observe", "reference", 17.32, "forward", shape=shape),
        row("rssm_observe", "cuDNN LSTM float16", 0.2, "forward", shape=shape, alone=True),
    ]
    text = table.render(report(rows=rows, not_run={"knn_bonus": "no time left"}), MACHINES["h100"])
    line = next(line for line in text.splitlines() if line.startswith("rssm_observe"))
    assert line.split()[:9] == ["rssm_observe", "B=16", "T=50", "bfloat16", "f", "0.866", "0.866", "62%", "cuda"]
    assert "20.0x" in line and "cuDNN LSTM float16 0.200" in line
    assert "not run: knn_bonus: no time left" in text
    assert "NOT MET" in text  # 0.6 ms
    assert "tests: not run" in text and "1 rows are of a contestant timed by itself" in text


def test_table_is_short_whatever_happened() -> None:
    ops_ = [f"op{i}" for i in range(80)]
    many = {f"what {i}": "why " * 90 for i in range(90)}
    tests = suite.summary([{"test": str(i), "outcome": "failed", "seconds": 1.0, "why": "x" * 400} for i in range(99)])
    rows = [row(op, "triton", 1.0) for op in ops_]
    whole = report(rows=rows, problems=many, left_out=many, not_run=many, tests=tests | {"seconds": 9.0})
    text = table.render(whole, MACHINES["h100"])
    assert len(text.splitlines()) < 60 and len(text) < 12_000
    assert "99 failed" in text and text.splitlines()[-1].endswith("see the JSON file")
    assert "observe B=16 over the best rival" in text and "op0" in text  # targets and the first results are there


def test_a_later_row_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.json"
    ledger = Ledger(path, {"GPU": "none"}, Clock())
    ledger.row(row("rssm_observe", "cuda", 2.0, alone=True))
    ledger.row(row("rssm_observe", "triton", 3.0))
    ledger.row(row("rssm_observe", "cuda", 2.0, "forward"))
    ledger.row(row("rssm_observe", "cuda", 1.0))
    rows = json.loads(path.read_text())["rows"]
    assert [(r["backend"], r["pass"], r["median_ms"]) for r in rows] == [
        ("cuda", "forward_backward", 1.0),
        ("triton", "forward_backward", 3.0),
        ("cuda", "forward", 2.0),
    ]
    assert "alone" not in rows[0]
    assert os.listdir(path.parent) == ["report.json"]


def test_a_file_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    ledger = Ledger(path, {}, Clock())
    ledger.save()

    def full(self: Path, text: str) -> int:
        self.write_bytes(text.encode()[:10])
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="no space"):
            ledger.skip("tests", "why")
    assert json.loads(path.read_text())["not_run"] == {}


PEERS = tuple(forecast.PEERS)


@pytest.mark.parametrize(("cached", "peers"), [(False, ()), (False, ("contextwm",)), (True, ()), (True, PEERS)])
def test_the_forecast_fits(cached: bool, peers: tuple[str, ...]) -> None:
    """What the targets speak of, in the default stages: the first call with ContextWM, a second one with all peers."""
    estimate = forecast.forecast(cached=cached, peers=peers)
    assert list(estimate.needed) == ["start", *SECTIONS]
    assert estimate.total == sum(estimate.needed.values()) <= SECONDS == 430.0
    end = 0.0
    for name, cost in estimate.needed.items():
        end += cost
        share = sum(list(BUDGETS.values())[: list(BUDGETS).index(name) + 1])
        assert end <= share, f"{name} ends after its share of the time"
    assert estimate.needed["smoke"] <= 60.0
    there = forecast.compiled(SECTIONS, peers)
    there = forecast.compiled(SECTIONS, peers, there) if cached else there
    left = BUDGETS["rivals"]
    for contest in filter(None, forecast.rivals(there, peers, needed=True).values()):
        for who, cost in contest.items():
            assert cost <= stages.SHARES[True] * left, f"{who} would be stopped"
        left -= sum(contest.values())


def test_what_the_forecast_says(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, peer = forecast.forecast(), forecast.forecast(peers=["contextwm"])
    assert alone.peers == 0 and peer.peers == pytest.approx(peer.total - alone.total) and peer.peers > forecast.PEER
    assert alone.others > 0 and peer.others > alone.others  # ContextWM has a pre-training update too
    without = forecast.forecast(library=False)
    assert without.needed["start"] == alone.needed["start"] + forecast.NVCC
    assert set(forecast.forecast(("core",)).needed) == {"start", "core"}
    first, second = forecast.lines(SECTIONS, library=True, cached=False, peers=["contextwm"])
    assert f"{peer.total:.0f} s for what targets speak of" in first and "430" not in first  # no budget, but a sum
    assert f"of that {peer.peers:.0f} s for contextwm" in second and f"{peer.others:.0f} s more" in second
    assert "no other" in forecast.lines(SECTIONS, library=True, cached=False, peers=[])[1]
    for name in forecast.PEERS:
        monkeypatch.delenv(f"APV_FAST_PEER_{name.upper()}", raising=False)
    monkeypatch.setenv("APV_FAST_PEER_TORCHRL", "/somewhere")
    assert forecast.named() == ["torchrl"]


def test_a_compilation_that_is_cut_off_counts_again() -> None:
    """Functions of a whole update: those that end within smoke's minute are there, the next run goes on after them."""
    update = ("finetune_update B=50", forecast.COMPILED)
    once = forecast.compiled(SECTIONS)
    again = forecast.compiled(SECTIONS, before=once)
    assert 0 < once[update] < again[update] == len(forecast.FINETUNE)
    rivals = [forecast.forecast(cached=cached).needed["rivals"] for cached in (False, True)]
    assert rivals[0] - rivals[1] == sum(forecast.FINETUNE[once[update] :])
    scan = ("rssm_observe B=16", forecast.SCANNED)
    assert once[scan] == len(forecast.INDUCTOR)  # what a target is about is ready when it is timed
    assert all(once[name, "core"] for name in forecast.CONTESTS)

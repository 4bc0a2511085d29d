"""The benchmark suite: what it measures and writes, that contestants take turns, that every op has a case."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.profiler import record_function

from apv_fast.backend import IMPLEMENTATIONS, probe

pytest.importorskip("bench", reason="bench/ is not installed; it runs from a checkout")
from bench import __main__, breakdown, ceilings, memory, plots, report, targets, timing
from bench.__main__ import main
from bench.cost import machine
from bench.measure import measure
from bench.registry import (
    AUTOCAST,
    EAGER_FP32,
    FORWARD_BACKWARD,
    Case,
    Problem,
    contestants,
    load,
    select,
    wider,
)

CPU = torch.device("cpu")
FACTS = {"CPU": "a CPU", "threads": "2", "date": "today"}
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


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command without what takes seconds, or changes the process for the tests after it."""
    monkeypatch.setattr(ceilings, "measure", lambda: {"fp32_tflop_s": 0.4})
    monkeypatch.setattr(__main__, "keep_freed_memory", lambda: True)


@pytest.mark.usefixtures("light")
def test_json_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "made" / "rows.json"
    assert main(["--only", "knn_bonus Q=16 ", "--seconds", "0.01", "--device", "cpu", "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    assert content["ceilings"] == {"fp32_tflop_s": 0.4}
    assert content["machine"]["memory"] == "freed memory is kept"
    rows = content["rows"]
    assert {"reference", "torch"} <= {row["backend"] for row in rows}
    for row in rows:
        assert list(row) == FIELDS
        assert (row["op"], row["device"], row["dtype"], row["pass"]) == ("knn_bonus", "cpu", "float32", "forward")
        assert row["shape"] == {"Q": 16, "N": 4096, "d": 128, "k": 16}
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["runs"] >= timing.MIN_ROUNDS
        reference = next(row for row in rows if row["backend"] == "reference")
        assert row["baseline_ratio"] == pytest.approx(reference["median_ms"] / row["median_ms"], rel=1e-3)
    assert (path.parent / "rows-medians.png").stat().st_size > 1000
    assert "threads: " in path.with_suffix(".txt").read_text()
    assert "knn_bonus Q=16" in capsys.readouterr().out


@pytest.mark.usefixtures("light")
def test_a_case_that_fails_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(device: torch.device, dtype: torch.dtype, n: int) -> Problem:
        raise ValueError("this one is broken")

    cases = [
        Case(name, {"n": 1}, torch.float32, build, ("knn_bonus",)) for name, build in (("a", broken), ("b", record))
    ]
    monkeypatch.setattr(__main__, "select", lambda *_, **__: cases)
    assert main(["--seconds", "0", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "a n=1 float32 failed: ValueError: this one is broken" in out
    assert "b n=1 float32\n" in out


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


TOGETHER = {  # ops that share a module
    "normalize_image": "image_loss",
    "image_encoder": "image_model",
    "image_decoder": "image_model",
    "kl_balance_normal": "kl_balance",
}


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_every_op_has_its_cases(op: str) -> None:
    """In the module of its name, for ``python -m bench`` and, where a backend for GPUs has it, ``bench.device``."""
    module = f"bench.cases.{TOGETHER.get(op, op)}"
    cases = [case for case in load() if case.op == op]
    assert {case.build.__module__ for case in cases} == {module}
    assert any(case.bench and not case.slow for case in cases)
    assert any(case.device for case in cases) or not {"triton", "cuda"} & IMPLEMENTATIONS[op].keys()


def test_a_backend_that_auto_picks_for_all_is_not_timed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("both", {"n": 1}, torch.float32, record, ("knn_bonus", "video_bonus"))
    if not probe("cpu").available:
        pytest.skip("the extension is not built")
    assert contestants(case, CPU)[0] == ["reference", "auto"]
    monkeypatch.delitem(IMPLEMENTATIONS["video_bonus"], "cpu")
    assert contestants(case, CPU)[0] == ["reference", "auto"]  # knn_bonus in C++, the other in PyTorch
    monkeypatch.delitem(IMPLEMENTATIONS["knn_bonus"], "cpu")
    assert contestants(case, CPU)[0] == ["reference"]


def test_long_work_is_warm_after_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(timing, "LONG", 0.0)
    timing.warm_up(lambda: calls.append(0))
    assert len(calls) == 1
    monkeypatch.setattr(timing, "LONG", 10.0)
    timing.warm_up(lambda: calls.append(0))
    assert len(calls) > 3


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


CALLS: list[tuple[str, torch.dtype, bool]] = []  # of record


def record(device: torch.device, dtype: torch.dtype, n: int) -> Problem:
    """A case whose work tells how it was called: contestant, dtype, autocast."""

    def run(name: str) -> object:
        CALLS.append((name, dtype, torch.is_autocast_enabled("cpu")))
        return CALLS[-1]

    return Problem({"forward": run})


def test_wider_contestants_run_the_reference_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("a", {"n": 1}, torch.bfloat16, record, ("knn_bonus",), wider=(EAGER_FP32, AUTOCAST))
    passes = {name: other.prepare() for name, other in wider(case, CPU).items()}
    assert passes[EAGER_FP32]["forward"]() == ("reference", torch.float32, False)
    assert passes[AUTOCAST]["forward"]() == ("reference", torch.float32, True)
    monkeypatch.setattr(timing, "WARM_UP_SECONDS", 0.0)
    CALLS.clear()
    rows, _ = measure(case, CPU, 0.0)
    assert {("reference", torch.float32, False), ("reference", torch.float32, True)} <= set(CALLS)
    assert {name for name, _, _ in CALLS} <= {row["backend"] for row in rows} - {EAGER_FP32, AUTOCAST}
    assert {EAGER_FP32, AUTOCAST, "reference"} <= {row["backend"] for row in rows}
    assert {row["dtype"] for row in rows} == {"bfloat16"}
    assert {case.wider for case in select(slow=True) if case.dtype == torch.float32} == {()}


def allocate(device: torch.device, dtype: torch.dtype, B: int, T: int) -> Problem:
    """B·T megabytes for a moment, half of them as the result; more than that while it is built."""
    torch.ones(6 * B * T, 125_000)

    def run(name: str) -> object:
        first = torch.ones(B * T, 125_000)
        second = torch.ones(B * T, 125_000)
        return first if name == "reference" else (first, second)

    return Problem({FORWARD_BACKWARD: run})


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")
@pytest.mark.parametrize("contestant", ["reference", "other"])
def test_peak_of_memory_counts_what_was_freed_too(contestant: str) -> None:
    case = Case("a", {"B": 8, "T": 8}, torch.float32, allocate, ("knn_bonus",))
    assert memory.measure(case, contestant) == pytest.approx(64, abs=4)


def test_peak_of_memory_says_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("no such case", {"B": 1}, torch.float32, allocate, ("knn_bonus",))
    monkeypatch.setattr(memory, "SECONDS", 0.01)
    with pytest.raises(RuntimeError, match="no such case B=1 float32 of cpu took over"):
        memory.peak(case, "cpu")


class Slow(torch.autograd.Function):
    """The identity, whose gradient takes a while."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return grad, None


def test_backward_counts_where_forward_was() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        x = torch.ones(3).requires_grad_()
        with record_function("update"):
            with record_function("image_encoder"):
                y = Slow.apply(x, 0.05)  # type: ignore[no-untyped-call]
            with record_function("mlp"):
                loss = Slow.apply(y, 0.1).sum()  # type: ignore[no-untyped-call]
            with record_function("backward"):
                loss.backward()
    parts = breakdown.attribute(list(profiler.events() or ()))
    assert 50 <= parts["encoder"] < 90
    assert 100 <= parts["heads"] < 150
    assert parts["other"] < 40


def test_ceilings_are_those_that_the_model_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SHAPES", ((8, 8, 8),)), ("FAR", 4096), ("NEAR", 1024), ("RUNS", 1)):
        monkeypatch.setattr(ceilings, name, value)
    rates = ceilings.measure()
    assert min(rates.values()) >= 0
    here = machine.with_ceilings(machine.CPU, {name: 1.0 for name in rates})
    assert (here.hbm, here.l2, here.rates) == (1e12, 1e12, {"bf16": 1e12, "tf32": 1e12, "fp32": 1e12})


def row(backend: str, median: float, *, dtype: str = "float32", **more: Any) -> report.Row:
    shape = {"B": 16, "T": 25, "E": 1536, "A": 0, "deter": 1024, "hidden": 1024, "stoch": 32, "discrete": 32}
    what = {"op": "rssm_observe", "backend": backend, "device": "cpu", "dtype": dtype, "shape": shape}
    times = {"median_ms": median, "p10_ms": median, "p90_ms": median, "runs": 5, "baseline_ratio": 1.0}
    return what | {"pass": FORWARD_BACKWARD} | times | more


def test_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("reference", 500.0, peak_mb=200.0), row("cpu", 100.0, peak_mb=90.0)]
    rows += [row(EAGER_FP32, 500.0, dtype="bfloat16"), row(AUTOCAST, 210.0, dtype="bfloat16")]
    rows += [row("reference", 250.0, dtype="bfloat16"), row("cpu", 75.0, dtype="bfloat16")]
    rows += [row("reference", 4400.0, op="finetune_update"), row("auto", 4000.0, op="finetune_update")]
    rows += [row("reference", 6000.0, op="pretrain_update"), row("auto", 2000.0, op="pretrain_update")]
    path, other = tmp_path / "a.json", tmp_path / "slow.json"
    path.write_text(json.dumps({"rows": rows, "ceilings": {"fp32_tflop_s": 0.4}}))
    other.write_text(json.dumps({"rows": [row("torch.compile", 300.0), row("cpu", 110.0)]}))
    assert targets.main([str(path), str(other)]) == 0
    lines = {line.split(" | ")[0]: line.split(" | ")[1:7] for line in capsys.readouterr().out.splitlines()}
    assert lines["| observe, fp32"] == ["500 ms (eager)", "100 ms", "5.00×", "", "≥ 4×", "yes"]
    assert lines["| observe, fp32, over torch.compile"] == [
        "300 ms (torch.compile)",
        "110 ms",
        "2.73×",
        "",
        "≥ 2.5×",
        "yes",
    ]
    half = ["210 ms (autocast)", "75 ms", "2.80×", "6.67×", "≥ 3×, ≥ 6.5× fp32", "**no**"]
    assert lines["| observe, bf16"] == half, "against PyTorch in the same dtype; float32 is in a column of its own"
    assert lines["| peak memory of observe, fp32"] == ["200 MB (eager)", "90 MB", "45%", "", "≤ 40%", "**no**"]
    assert lines["| fine-tuning update, fp32"] == ["4.40 s (eager)", "4.00 s", "1.10×", "", "≤ 4.50 s", "yes"]
    assert lines["| pre-training update, fp32"] == ["6.00 s (eager)", "2.00 s", "3.00×", "", "≤ 1.90 s", "**no**"]
    assert lines["| fine-tuning update, bf16"] == ["not measured", "not measured", "", "", "≤ 2.60 s", "?"]
    assert targets.main([str(tmp_path / "missing.json")]) == 2


def test_commands_of_the_targets_find_their_case() -> None:
    for target in targets.TARGETS:
        cases = select(f"{target.op} {target.only}{target.dtype}")
        assert len(cases) == 1, target.command
        assert target.shape.items() <= cases[0].shape.items()
        assert AUTOCAST not in target.over or target.dtype == "float32" or AUTOCAST in cases[0].wider
        assert target.times_fp32 is None or EAGER_FP32 in cases[0].wider


def test_plots(tmp_path: Path) -> None:
    sweep = [row("cpu", 1.0 + size, op="observe_sweep") for size in range(3)]
    parts = [{"op": "a", "backend": "cpu", "dtype": "float32", "shape": {}, "parts_ms": {"scan": 2.0, "other": 1.0}}]
    rows = [row("reference", 300.0), row("cpu", 100.0), *sweep]
    paths = plots.draw(tmp_path / "r.json", report.Results(FACTS, rows, {}, parts))
    assert [path.stem for path in paths] == ["r", "r-medians", "r-sizes", "r-floors", "r-updates"]
    assert all(path.stat().st_size > 1000 for path in paths)
    elsewhere = [row("cpu", 100.0, device="cuda"), row("torch.compile", 100.0), row("cpu", 100.0, op="no model of it")]
    [(label, backend, share)] = plots.shares([row("cpu", 100.0), *elsewhere], {"fp32_tflop_s": 0.48})
    assert (backend, label.split()[0]) == ("cpu", "rssm_observe")
    assert share == pytest.approx(0.66, abs=0.02)


def test_ratios_are_of_the_same_dtype() -> None:
    """The best of PyTorch in the dtype of the case; eager float32 beside bfloat16 is not among them."""
    rows = [row("reference", 400.0), row("torch.compile", 300.0), row("cpu", 100.0), row(EAGER_FP32, 100.0)]
    rows += [row("reference", 90.0, dtype="bfloat16"), row(AUTOCAST, 80.0, dtype="bfloat16")]
    rows += [row(EAGER_FP32, 10.0, dtype="bfloat16"), row("cpu", 40.0, dtype="bfloat16")]
    name = "rssm_observe B=16 T=25 D=1024"
    assert plots.ratios(rows) == {(name, "float32"): 3.0, (name, "bfloat16"): 2.0}
    printed = report.table(rows[4:])
    assert list(printed.columns[5].cells) == ["0.89", "1.00", "", "2.00"]
    assert list(printed.columns[6].cells) == ["0.11", "0.12", "1.00", "0.25"]


def test_pictures_are_of_a_size_that_can_be_read(tmp_path: Path) -> None:
    """However many rows a run leaves."""
    assert [len(page) for page in plots.pages(list(range(82)), 40)] == [27, 27, 28]
    assert plots.pages([], 40) == []
    rows = [
        row(backend, 10.0 + size, op=f"op{size}", **{"pass": passed})
        for size in range(45)
        for backend in ("reference", "cpu", "torch.compile")
        for passed in ("forward", FORWARD_BACKWARD)
    ]
    parts = [{"op": "a", "backend": "cpu", "dtype": "float32", "shape": {}, "parts_ms": {"scan": 2.0}}] * 20
    paths = plots.draw(tmp_path / "r.json", report.Results(FACTS, rows, {}, parts))
    names = ["r.png", "r-2.png", "r-medians.png", "r-medians-2.png", "r-medians-3.png"]
    names += ["r-updates.png", "r-updates-2.png"]
    assert [path.name for path in paths] == names
    for path in paths:
        width, height = Image.open(path).size
        assert width <= 1600 and height <= 1200, path.name

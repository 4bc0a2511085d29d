"""The contests of ``python -m bench.device``, on the CPU with tiny sizes."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("bench", reason="bench/ is not installed; it runs from a checkout")
from apv_fast.agent.agent import Agent, Pretrainer
from apv_fast.backend import IMPLEMENTATIONS, BackendError
from bench import timing
from bench.cases import updates
from bench.gpu import contests, forecast, work
from bench.gpu.contests import Contest
from bench.gpu.graphs import CaptureError
from bench.peers import remote
from bench.registry import COMPILED, Case, Passes
from bench.registry import load as all_cases
from tests.support import peer_trees

CPU = torch.device("cpu")
TINY = {"B": 2, "T": 3, "E": 5, "A": 4, "deter": 6, "hidden": 7, "stoch": 2, "discrete": 3}


def test_training_is_asked_for_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it reports goes on at once; it gets the seconds that the job has."""
    told, module = Told(), ModuleType("bench.gpu.train")

    def measure(seconds: float, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        report({"updates": 1})
        assert told.events == [("item", {"updates": 1})]
        return {"seconds": seconds}

    module.measure = measure  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bench.gpu.train", module)
    assert work.run("train", {"seconds": 7.0}, told) == {"seconds": 7.0}  # type: ignore[arg-type]


class Uncaptured:
    def __init__(self, work: Callable[[], object]) -> None:
        self.replay = work


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contests on the CPU: no graph, no memory statistics, few rounds."""
    for module in (contests, work):
        if hasattr(module, "DEVICE"):
            monkeypatch.setattr(module, "DEVICE", CPU)
        if hasattr(module, "capture"):
            monkeypatch.setattr(module, "capture", Uncaptured)
    monkeypatch.setattr(contests, "OURS", ("reference",))
    monkeypatch.setattr(work, "_prepared", lambda prepare: (prepare(), 1.0))
    monkeypatch.setattr(timing, "WARM_UP_SECONDS", 0.0)
    monkeypatch.setattr(timing, "MIN_ROUNDS", 2)


class Told:
    """In place of :class:`bench.gpu.worker.Tell`: keeps what a job says, as the parent would."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def stage(self, name: str) -> None:
        self.events.append(("stage", name))

    def item(self, item: Any) -> None:
        self.events.append(("item", item))

    def finished(self, name: str) -> None:
        self.events.append(("finished", name))

    def items(self, key: str) -> list[Any]:
        return [item for kind, item in self.events if kind == "item" and key in item]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The last row of each contestant, pass and cache."""
        last = {
            (item["row"]["backend"], item["row"]["pass"], item["row"]["cache"]): item["row"]
            for item in self.items("row")
        }
        return list(last.values())

    def lost(self, kind: str) -> dict[str, str]:
        return {item[kind]: item["why"] for item in self.items(kind)}


def compete(op: str, players: Callable[[Contest], Any], shape: Mapping[str, int], without: Sequence[str] = ()) -> Told:
    """Both kinds of contestants, one after the other."""
    told = Told()
    arguments = {"without": list(without), "pass_seconds": 0.0}
    for run in (work.core, work.rivals):
        run(Contest(op, shape, "float32", players), arguments, told)  # type: ignore[arg-type]
    return told


def case_of(op: str) -> Case:
    """The op's first case of bench.device, in float32."""
    case = next(case for case in all_cases() if case.op == op and case.device)
    return replace(case, dtype=torch.float32)


def players_of(op: str) -> Callable[[Contest], Any]:
    """Its contestants."""
    return functools.partial(contests.players_of, case_of(op))


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("op", ["rssm_observe", "stacked_observe", "rssm_imagine"])
def test_contests_of_scans(op: str) -> None:
    tiny = {name: size for name, size in TINY.items() if name in case_of(op).shape}
    told = compete(op, players_of(op), tiny)
    assert told.lost("left_out") == {}
    assert {row["pass"] for row in told.rows} == {"forward", "forward_backward"}
    names = {row["backend"] for row in told.rows}
    assert {"reference", "reference in a graph"} <= names
    assert ("two scans, reference" in names) == (op == "stacked_observe")
    for row in told.rows:
        assert row["shape"] == tiny and row["cache"] == "cold" and row["median_ms"] > 0


@pytest.mark.usefixtures("on_cpu")
def test_a_contestant_that_fails_is_left_out() -> None:
    def players(contest: Contest) -> dict[str, Callable[[], Passes]]:
        def fails() -> Passes:
            raise ValueError("not here")

        def refuses() -> Passes:
            raise BackendError("not this dtype")

        ours = {"triton, a launch a phase": fails, "cuda": refuses, "two scans, triton": fails, "auto": fails}
        return {"fine": lambda: {"forward": lambda: None}, "fails": fails, "hung before": fails} | ours

    told = compete("rssm_observe", players, TINY, without=["hung before"])
    assert told.lost("left_out") == {"fails": "ValueError: not here", "cuda": "BackendError: not this dtype"}
    failed = ("triton, a launch a phase", "two scans, triton", "auto")
    assert told.lost("failed") == dict.fromkeys(failed, "ValueError: not here")
    assert [row["backend"] for row in told.rows] == ["fine"]
    assert told.rows[0]["baseline_ratio"] is None


def instant(contest: Contest) -> dict[str, Callable[[], Passes]]:
    """Contestants of both kinds that do nothing."""

    def ready() -> Passes:
        return {"forward": lambda: None, "forward_backward": lambda: None}

    return dict.fromkeys(("cuda", "triton", "reference", "triton, a launch a phase", "one rival", "another"), ready)


@pytest.mark.usefixtures("on_cpu")
def test_rows_are_told_as_they_are_made() -> None:
    """A contestant's own as soon as it is ready; those in turns with the others later, in place of them."""
    told, arguments = Told(), {"without": [], "pass_seconds": 0.0}
    work.core(Contest("rssm_observe", TINY, "float32", instant), arguments, told)  # type: ignore[arg-type]
    said = [item["row"]["backend"] if kind == "item" else f"at {item}" for kind, item in told.events]
    alone = [word for name in ("cuda", "triton", "reference") for word in (f"at {name}", name, name)]
    assert said == ["at the inputs", *alone, "at ", *["cuda", "triton", "reference"] * 2]
    rows = [item["row"] for item in told.items("row")]
    assert [bool(row.get("alone")) for row in rows] == [True] * 6 + [False] * 6
    assert all(row["baseline_ratio"] is None for row in rows if row.get("alone") and row["backend"] != "reference")
    assert all(row["baseline_ratio"] > 0 for row in rows[6:])


@pytest.mark.usefixtures("on_cpu")
def test_each_rival_takes_turns_with_ours() -> None:
    """And its row has their times in the same rounds; nobody else's row is made anew."""
    told, arguments = Told(), {"without": ["another"], "pass_seconds": 0.0}
    work.rivals(Contest("rssm_observe", TINY, "float32", instant), arguments, told)  # type: ignore[arg-type]
    rows = [item["row"] for item in told.items("row")]
    rivals = ["one rival"] * 2 + ["triton, a launch a phase"] * 2  # which no target is about
    assert [row["backend"] for row in rows] == rivals
    assert all(set(row["beside_ms"]) == {"cuda", "triton"} and min(row["beside_ms"].values()) > 0 for row in rows)
    assert [name for kind, name in told.events if kind == "finished"] == ["one rival", "triton, a launch a phase"]


@pytest.mark.usefixtures("on_cpu")
def test_a_warm_up_prepares_and_times_nothing() -> None:
    prepared: list[str] = []

    def players(contest: Contest) -> dict[str, Callable[[], Passes]]:
        def prepare(name: str) -> Passes:
            prepared.append(name)
            return {}

        return {name: functools.partial(prepare, name) for name in instant(contest)}

    jobs: list[tuple[str, dict[str, int], list[str]]] = [
        ("core", {"turn": 0, "of": 1}, ["cuda", "triton", "reference"]),
        ("rivals", {}, ["one rival", "another"]),
        ("rivals", {"turn": 1, "of": 2}, ["another"]),
        ("rivals", {"turn": 2, "of": 3}, []),
    ]
    for who, turn, expected in jobs:
        prepared.clear()
        told, arguments = Told(), {"without": ["triton, a launch a phase"], "who": who, **turn}
        work.warm_up(Contest("rssm_observe", TINY, "float32", players), arguments, told)  # type: ignore[arg-type]
        assert prepared == expected and told.items("row") == []


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error: unspecified launch failure"), CaptureError("a host sync")],
    ids=["CUDA", "graph"],
)
def test_an_error_that_ends_the_process(error: Exception) -> None:
    """And not only the contestant."""

    def broken() -> Passes:
        raise error

    with pytest.raises(type(error), match=str(error)):
        compete("rssm_observe", lambda contest: {"broken": broken}, TINY)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("op", "more"), [("pretrain_update", {}), ("finetune_update", {"horizon": 2})])
def test_contests_of_updates(op: str, more: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(updates.WAYS, "auto", ("auto", "auto"))
    monkeypatch.delitem(updates.WAYS, "reference in a graph")  # an error without a GPU
    monkeypatch.setattr(updates, "COMPILED_WAY", ("reference", "off"))
    learners: list[object] = []
    monkeypatch.setattr(updates, "compile_update", learners.append)  # compilation has a test of its own
    monkeypatch.setenv("APV_FAST_PEER_CONTEXTWM", str(tmp_path))
    shape = {"B": 1, "T": 6, "deter": 8, "hidden": 8, "cnn_depth": 2, **more}
    told = compete(op, players_of(op), shape)
    assert told.lost("left_out") == {"ContextWM": f"PeerError: path is {tmp_path}: there is no wmlib"}
    names = {"auto", "auto, without a graph", "reference", "torch.compile in a graph"}
    assert {row["backend"] for row in told.rows} == names
    assert [type(learner) for learner in learners] == [Pretrainer if op == "pretrain_update" else Agent]
    assert {row["pass"] for row in told.rows} == {"forward_backward"}
    assert all(row["peak_mb"] == 1.0 for row in told.rows)


@pytest.mark.usefixtures("on_cpu")
def test_a_peer_is_a_contestant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With what is to be said of it in its row."""
    pytest.importorskip("yaml", reason="the peers' configurations are YAML")
    monkeypatch.setenv("APV_FAST_PEER_CONTEXTWM", str(peer_trees.contextwm(tmp_path / "mini")))
    shape = {"B": 1, "T": 6, "deter": 8, "hidden": 8, "cnn_depth": 2}
    told = compete("pretrain_update", players_of("pretrain_update"), shape, [*updates.WAYS, COMPILED + contests.GRAPH])
    assert told.lost("left_out") == told.lost("failed") == {}
    (row,) = told.rows
    assert (row["backend"], row["shape"], row["cache"]) == ("ContextWM", shape, "cold")
    assert row["median_ms"] > 0 and row["version"] == "mini" and row["parameters"] == 8
    assert row["peak_mb"] is None  # of its own process, which has no GPU here
    assert any("carried over" in words for words in row["differs"])


@pytest.mark.usefixtures("on_cpu")
def test_contests_of_other_ops() -> None:
    """One case of every op that a backend for GPUs has, of both caches."""
    case = case_of("lambda_return")
    assert contests.contest_of(case).caches == ("cold", "warm")
    assert case.shape == {"H": 15, "N": 2500}
    without = [COMPILED + contests.GRAPH]  # takes a while
    told = compete("lambda_return", players_of("lambda_return"), case.shape, without)
    assert {"reference", "reference in a graph"} <= {row["backend"] for row in told.rows}


def test_names_and_order_of_contests() -> None:
    ranking = work.load()
    names = [contest.name for contest in ranking]
    assert len(set(names)) == len(names)
    assert names[0].startswith("rssm_observe B=16 T=50") and names[0].endswith("bfloat16")
    gpu = {op for op, row in IMPLEMENTATIONS.items() if {"triton", "cuda"} & row.keys()}
    assert gpu <= {contest.op for contest in ranking}
    assert [contest.dtype for contest in ranking].index("tf32") > names.index(next(n for n in names if "finetune" in n))
    wanted = {one["name"]: one["rivals"] for one in work.run("list", {}, Told()) if one["target"]}  # type: ignore[arg-type]
    for name, cost in forecast.CONTESTS.items():
        (full_name,) = (one for one in wanted if one.startswith(f"{name} "))
        assert wanted[full_name] == cost.needed
    assert len(wanted) == len(forecast.CONTESTS) == 7
    assert list(forecast.PEERS) == list(remote.VARIABLES)
    assert [remote.VARIABLES[name] for name in forecast.PEERS] == [f"APV_FAST_PEER_{n.upper()}" for n in forecast.PEERS]

"""Drivers of other projects' updates: their protocol on miniature checkouts, and on real ones where they are named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("bench", reason="bench/ is not installed; it runs from a checkout")
pytest.importorskip("yaml", reason="the peers' configurations are YAML")
from bench.gpu.checkout import ROOT, environment
from bench.peers import remote
from bench.peers.setup import Peer, PeerError, Setup
from tests.support import peer_trees

SMALL = ("--batch=2", "--length=6", "--deter=8", "--hidden=8", "--cnn-depth=2", "--horizon=3", "--seconds=0")
SHAPE = {"B": 2, "T": 6, "deter": 8, "hidden": 8, "cnn_depth": 2, "horizon": 3}


def run(name: str, path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.peers", name, f"--path={path}", *SMALL, *more]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)


def row_of(name: str, path: Path, *more: str) -> Any:
    process = run(name, path, *more)
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout)
    assert report["machine"]["versions"]
    (row,) = report["rows"]
    return row


def check_row(row: Any, title: str, op: str) -> None:
    """A row like those of our own updates, with what is to be said of a peer."""
    assert (row["op"], row["backend"], row["pass"]) == (op, title, "forward_backward")
    assert (row["device"], row["dtype"]) == ("cpu", "float32")
    shape = {name: size for name, size in SHAPE.items() if op == "finetune_update" or name != "horizon"}
    assert row["shape"] == shape
    assert row["runs"] >= 3 and 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
    assert row["baseline_ratio"] is None and row["peak_mb"] is None
    assert row["version"] and row["parameters"] > 0 and len(row["differs"]) >= 3 and row["losses"]


@pytest.mark.parametrize("op", ["pretrain_update", "finetune_update"])
def test_contextwm_driver(op: str, tmp_path: Path) -> None:
    row = row_of("contextwm", peer_trees.contextwm(tmp_path / "mini"), f"--update={op}")
    check_row(row, "ContextWM", op)
    assert (row["version"], row["parameters"], list(row["losses"])) == ("mini", 8, ["model_loss"])


def test_r2dreamer_driver(tmp_path: Path) -> None:
    row = row_of("r2dreamer", peer_trees.r2dreamer(tmp_path / "mini"))
    check_row(row, "r2dreamer", "finetune_update")
    assert list(row["losses"]) == ["loss/image"]


@pytest.mark.parametrize(
    ("version", "expected"),
    [("0.14.0", "TorchRL 0.14.0; it must be 0.14.1 or newer"), ("0.15", "tensordict has no TensorDict")],
)
def test_torchrl_driver_refuses_what_it_does_not_know(version: str, expected: str, tmp_path: Path) -> None:
    process = run("torchrl", peer_trees.torchrl(tmp_path, version))
    assert process.returncode == 1 and expected in process.stderr, process.stderr
    assert process.stdout == ""


@pytest.mark.parametrize(
    ("fault", "expected"),
    [("idle", "2 updates have changed no weight"), ("nan", "model_loss is nan"), ("", "there is no wmlib")],
)
def test_a_peer_that_does_not_train_has_no_row(fault: str, expected: str, tmp_path: Path) -> None:
    path = peer_trees.contextwm(tmp_path / "mini", fault) if fault else tmp_path
    process = run("contextwm", path)
    assert process.returncode == 1, process.stdout
    assert expected.removeprefix("2 ") in process.stderr and "Traceback" not in process.stderr


@pytest.mark.parametrize("name", list(remote.VARIABLES))
def test_a_real_checkout(name: str) -> None:
    variable = remote.VARIABLES[name]
    if not os.environ.get(variable):
        pytest.skip(f"{variable} names no checkout")
    row = row_of(name, Path(os.environ[variable]), "--update=finetune_update")
    check_row(row, remote.TITLES[name], "finetune_update")


def test_a_peer_in_its_own_process(tmp_path: Path) -> None:
    path = peer_trees.contextwm(tmp_path / "mini", "dies")
    peer = remote.Remote("contextwm", path, "finetune_update", SHAPE, "float32", "cpu")
    assert peer.facts["parameters"] == 8 and peer.facts["losses"]["model_loss"] > 0
    peer.update()
    with pytest.raises(PeerError, match="contextwm: the process died, exit status 3"):
        peer.update()
    with pytest.raises(PeerError, match="the process died"):
        peer.update()


def test_a_peers_process_ends_with_it(tmp_path: Path) -> None:
    peer = remote.Remote(
        "r2dreamer", peer_trees.r2dreamer(tmp_path / "mini"), "finetune_update", SHAPE, "float32", "cpu"
    )
    process = peer._process
    peer.update()
    assert process.poll() is None
    del peer
    assert process.poll() is not None


def test_a_peer_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "START_SECONDS", 0.01)
    with pytest.raises(PeerError, match="contextwm: no answer in 0 s"):
        remote.Remote("contextwm", peer_trees.contextwm(tmp_path / "mini"), "pretrain_update", SHAPE, "float32", "cpu")


def test_peers_are_named_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in remote.VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    assert remote.named("finetune_update") == {}
    monkeypatch.setenv("APV_FAST_PEER_CONTEXTWM", "/a")
    monkeypatch.setenv("APV_FAST_PEER_TORCHRL", "/b")
    assert remote.named("finetune_update") == {"contextwm": Path("/a"), "torchrl": Path("/b")}
    assert remote.named("pretrain_update") == {"contextwm": Path("/a")}  # TorchRL has none


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"op": "update"}, "update is 'update'; it must be one of"),
        ({"dtype": "int8"}, "dtype is 'int8'; it must be one of"),
        ({"dtype": "tf32"}, "dtype is tf32; that needs --device cuda"),
        ({"batch": 0}, "batch is 0; it must be at least 1"),
    ],
)
def test_wrong_setups(wrong: dict[str, Any], expected: str) -> None:
    with pytest.raises(PeerError, match=expected):
        Setup(**{"op": "finetune_update"} | wrong)


def test_options_of_a_peer() -> None:
    setup = Setup("finetune_update", options={"queue": "empty"})
    assert setup.option("queue", ("full", "empty")) == "empty"
    assert Setup("finetune_update").option("queue", ("full", "empty")) == "full"
    with pytest.raises(PeerError, match="queue is 'empty'; it must be one of full, half"):
        setup.option("queue", ("full", "half"))
    with pytest.raises(PeerError, match="unknown option 'queue'; this peer has preset"):
        setup.only("preset")


@pytest.mark.parametrize(
    ("losses", "step", "expected"),
    [
        ([1.0, 2.0], 0.1, None),
        ([1.0, float("inf")], 0.1, "x: loss is inf after 2 updates"),
        ([1.0, 2.0], 0.0, "x: 2 updates have changed no weight"),
        ([], 0.1, "x: an update reports no loss"),
    ],
)
def test_warming_up_sees_whether_a_peer_trains(losses: Sequence[float], step: float, expected: str | None) -> None:
    weight = nn.Parameter(torch.zeros(2))
    left = list(losses)

    def update() -> dict[str, object]:
        with torch.no_grad():
            weight.add_(step)
        return {"loss": torch.tensor(left.pop(0))} if left else {}

    peer = Peer("x", update, [weight], (), "1")
    if expected is None:
        assert peer.warm_up(2) == {"loss": 2.0}
        return
    with pytest.raises(PeerError, match=expected):
        peer.warm_up(2)

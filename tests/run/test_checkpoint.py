"""Checkpoints: they survive crashes and full disks, and what does not fit is named."""

from __future__ import annotations

import copy
import io
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apv_fast.data import DiskError
from apv_fast.run import (
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    load_into,
    load_latest,
    restore_rng,
    rng_state,
    save_checkpoint,
)
from tests.support.samples import small_disk, small_files


def test_checkpoints_come_back_and_old_ones_go(tmp_path: Path) -> None:
    states = [{"weights": {"w": torch.full((3,), float(step))}, "n": step, "names": ["a", "b"]} for step in range(5)]
    for step, state in enumerate(states):
        save_checkpoint(tmp_path, step, state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000000003.pt", "step-000000000004.pt"]
    loaded = load_latest(tmp_path)
    assert loaded
    path, step, state = loaded
    assert (path, step, state["n"], state["names"]) == (latest_checkpoint(tmp_path), 4, 4, ["a", "b"])
    assert torch.equal(state["weights"]["w"], states[4]["weights"]["w"])  # type: ignore[index]


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
    assert load_latest(tmp_path / "none") is None


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"n": 1})
    newest = save_checkpoint(tmp_path, 2, {"n": 2})
    newest.write_bytes(newest.read_bytes()[:-30])
    with pytest.raises(CheckpointError, match=f"{newest}: archive: "):
        load_checkpoint(newest)
    with pytest.warns(UserWarning, match=f"skipped a checkpoint: {newest}"):
        loaded = load_latest(tmp_path)
    assert loaded and loaded[1] == 1
    (tmp_path / "step-000000000001.pt").write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match=r"step-000000000001\.pt: archive"):
        load_latest(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"format": 1, "step": 1, "state": {}}, "format: must be 2, not 1; another version"),
        ({"weights": 1}, "format: this is not a checkpoint"),
        ([1], "format: this is not a checkpoint"),
        ({"format": 2, "step": 1, "state": Path("code")}, "archive: is damaged, or holds objects that could run code"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "step-000000000001.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


class Nested:
    """Something whose state has levels."""

    def __init__(self, size: int) -> None:
        self.state = {"count": 1, "moments": {"w": torch.zeros(size)}}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: Any, /) -> None:
        self.state = state


@pytest.mark.parametrize(
    ("target", "state", "message"),
    [
        (torch.nn.Linear(3, 4), {"bias": torch.zeros(4)}, r"model\.weight: is missing"),
        (
            torch.nn.Linear(3, 4),
            {"weight": torch.zeros(4, 5), "bias": torch.zeros(4)},
            r"model\.weight: must be a tensor \[4, 3\], not a tensor \[4, 5\]",
        ),
        (
            torch.nn.Linear(3, 4, bias=False),
            {"weight": torch.zeros(4, 3), "bias": torch.zeros(4)},
            r"model\.bias: is not part of this configuration",
        ),
        (Nested(3), {"count": 1, "moments": {"w": torch.zeros(2)}}, r"model\.moments\.w: must be a tensor \[3\]"),
        (Nested(3), {"count": 1, "moments": 7}, r"model\.moments: must be a dict, not a int"),
        (Nested(3), {"count": torch.zeros(2), "moments": {"w": torch.zeros(3)}}, r"model\.count: must be a int"),
    ],
)
def test_a_checkpoint_of_another_configuration(target: Any, state: dict[str, Any], message: str) -> None:
    before = copy.deepcopy(dict(target.state_dict()))
    with pytest.raises(CheckpointError, match=f"some/file.pt: {message}"):
        load_into(target, state, source="some/file.pt", field="model")
    assert str(dict(target.state_dict())) == str(before), "nothing was loaded"


@pytest.mark.parametrize("how", ["file size limit", "full file system"])
def test_a_full_disk_keeps_the_older_checkpoints(tmp_path: Path, how: str) -> None:
    with small_files(200_000) if how == "file size limit" else small_disk(tmp_path, "200k"):
        kept = [save_checkpoint(tmp_path, step, {"n": step}) for step in (1, 2)]
        with pytest.raises(DiskError, match=f"cannot write {tmp_path}/step-000000000003.pt"):
            save_checkpoint(tmp_path, 3, {"w": torch.rand(100_000)})
        assert sorted(tmp_path.iterdir()) == kept
        loaded = load_latest(tmp_path)
        assert loaded and loaded[1] == 2


SAVER = """
import sys, torch
from pathlib import Path
from apv_fast.run import save_checkpoint
for step in range(10**6):
    save_checkpoint(Path(sys.argv[1]), step, {"w": torch.full((200_000,), float(step))})
    print(step, flush=True)
"""


def test_kill_9_while_saving_loses_no_checkpoint(tmp_path: Path) -> None:
    for attempt in range(3):
        directory = tmp_path / str(attempt)
        with subprocess.Popen(
            [sys.executable, "-c", SAVER, str(directory)], stdout=subprocess.PIPE, text=True
        ) as saver:
            assert saver.stdout
            for _ in range(3):
                saver.stdout.readline()
            time.sleep(0.011 * attempt)
            saver.send_signal(signal.SIGKILL)
            last = max([2, *map(int, saver.stdout.read().split())])
        steps = sorted(load_checkpoint(path)[0] for path in directory.glob("step-*.pt"))
        assert steps[-1] in (last, last + 1)  # it may have been killed between saving and saying so
        for path in directory.glob("step-*.pt"):
            step, state = load_checkpoint(path)
            assert torch.equal(state["w"], torch.full((200_000,), float(step)))


@settings(max_examples=20, deadline=None)
@given(draws=st.integers(0, 700))
def test_random_generators_continue_where_they_were(draws: int) -> None:
    torch.rand(draws)
    file = io.BytesIO()
    torch.save(rng_state(), file)
    expected = torch.rand(9)
    torch.manual_seed(5)
    file.seek(0)
    restore_rng(torch.load(file, weights_only=True))
    assert torch.equal(torch.rand(9), expected)

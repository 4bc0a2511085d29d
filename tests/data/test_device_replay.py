"""The replay's copy on the device, and batches in pinned memory: the batches of the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apv_fast.data import VIDEO_KEYS, DeviceRows, EpisodeError, Replay
from tests.support.replays import add, fill, same
from tests.support.samples import make_episode, rows_of, through_a_file

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

ROW_BYTES = 64 * 64 * 3 + 2 * 4 + 4 + 3  # image, two actions, reward, flags


def on_host(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.cpu() for key, value in batch.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [None, VIDEO_KEYS], ids=["all keys", "videos"])
def test_the_device_gives_the_batches_of_the_host(tmp_path: Path, keys: tuple[str, ...] | None) -> None:
    """The same draws, bit for bit, while episodes come, go, and the run is resumed."""
    options: dict[str, Any] = {"chunk_length": 5, "online": True, "seed": 3, "capacity_steps": 60}
    options |= {"prioritize_ends": True} | ({"keys": keys} if keys else {})
    host = Replay(tmp_path / "host", **options)
    device = Replay(tmp_path / "device", **options, rows=DeviceRows(DEVICE))
    for index in range(7):
        for replay in (host, device):
            add(replay, 12 + index, seed=index)
        batches = [host.sample(6), device.sample(6)]
        assert same(batches[0], on_host(batches[1]))
        assert {value.device.type for value in batches[1].values()} == {DEVICE.type}
        assert {key: value.dtype for key, value in batches[0].items()} == {k: v.dtype for k, v in batches[1].items()}
    resumed = Replay(tmp_path / "device", **(options | {"seed": 9}), rows=DeviceRows(DEVICE))
    resumed.load_state_dict(through_a_file(device.state_dict()))
    assert same(host.sample(20), on_host(resumed.sample(20)))
    assert device.description.startswith(f"from {DEVICE}") and host.description == "from the host"


@pytest.mark.gpu
def test_the_host_takes_over_beyond_the_budget(tmp_path: Path) -> None:
    host = Replay(tmp_path / "host", chunk_length=5, online=True)
    device = Replay(tmp_path / "device", chunk_length=5, online=True, rows=DeviceRows(DEVICE, 40 * ROW_BYTES))
    for replay in (host, device):
        add(replay, 15, seed=1)
        add(replay, 15, seed=2)
    assert device.description == f"from {DEVICE} (0.000492 GB there)"
    with pytest.warns(UserWarning, match=r"drawn from the host from now on: 48 of them need 0\.000591 GB of"):
        add(device, 15, seed=3)
    add(host, 15, seed=3)
    assert device.description == "from the host"
    for _ in range(3):
        assert same(host.sample(6), device.sample(6))
    strict = DeviceRows(DEVICE, 40 * ROW_BYTES, strict=True)
    with pytest.raises(MemoryError, match=r"replay: 48 of them need .* use --replay-device host, or a smaller --cap"):
        Replay(tmp_path / "host", chunk_length=5, rows=strict)


@pytest.mark.gpu
def test_a_device_that_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the budget allows and the device has not is the host's business too."""
    rows = DeviceRows(DEVICE)
    assert rows.write(0, {"image": np.ones((2, 64, 64, 3), np.uint8)})

    def full(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.warns(UserWarning, match=r"drawn from the host from now on: CUDA out of memory\. Tried to allocate$"):
        assert not rows.write(5000, {"image": np.ones((2, 64, 64, 3), np.uint8)})
    assert rows.gather([0], 2)["image"].sum() == 2 * 64 * 64 * 3, "what is there stays there"


@pytest.mark.gpu
@settings(max_examples=20, deadline=None)
@given(shape=st.lists(st.integers(1, 4), max_size=3), places=st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_rows_of_any_form(shape: list[int], places: list[int]) -> None:
    """Bytes that are not whole words too; growing keeps what is there."""
    generator = np.random.default_rng(0)
    columns: dict[str, np.ndarray] = {
        "image": generator.integers(0, 256, (10, *shape), dtype=np.uint8),
        "reward": generator.random((10, *shape), dtype=np.float32),
        "is_last": generator.random((10, *shape)) < 0.5,
    }
    rows = DeviceRows(DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apv_fast.data.device_replay.FIRST_ROWS", 1)
        for start in (0, 4, 7):
            end = {0: 4, 4: 7, 7: 10}[start]
            assert rows.write(start, {key: value[start:end] for key, value in columns.items()})
    batch = rows.gather(places, 4)
    for key, value in columns.items():
        expected = np.stack([value[place : place + 4] for place in places])
        np.testing.assert_array_equal(batch[key].cpu().numpy(), expected)
        assert batch[key].dtype == torch.from_numpy(value).dtype


def test_rows_for_a_gpu_are_copied_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the device: with a torch that writes down what it is asked for."""
    rows = DeviceRows(torch.device("cpu"))
    episode: dict[str, np.ndarray] = {"image": np.arange(24, dtype=np.uint8).reshape(3, 8)}
    episode["reward"] = np.ones(3, np.float32)
    assert rows.write(0, episode)
    pinned: list[torch.Tensor] = []
    copies: list[tuple[bool, bool]] = []  # from pinned memory, without waiting
    copy = torch.Tensor.copy_

    def pin(value: torch.Tensor) -> torch.Tensor:
        pinned.append(value.clone())
        return pinned[-1]

    def note(to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        copies.append((any(source is one for one in pinned), non_blocking))
        return copy(to, source)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "copy_", note)
    monkeypatch.setattr(rows, "device", torch.device("cuda"))
    assert rows.write(3, episode)
    assert copies == [(True, True)] * 2
    monkeypatch.undo()
    for key, value in episode.items():
        np.testing.assert_array_equal(rows.gather([3], 3)[key][0].numpy(), value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a GPU")
def test_batches_in_pinned_memory(tmp_path: Path) -> None:
    fill(tmp_path, [20])
    plain, pinned = (Replay(tmp_path, chunk_length=5, pin_memory=pin).sample(3) for pin in (False, True))
    assert same(plain, pinned) and all(value.is_pinned() for value in pinned.values())


def test_bad_rows(tmp_path: Path) -> None:
    replay = Replay(tmp_path, chunk_length=2, online=True)
    rows = rows_of(make_episode(4))
    with pytest.raises(EpisodeError, match="is_first: must be set on the first row"):
        replay.add(rows[1])
    with pytest.raises(EpisodeError, match="is_last: is missing"):
        replay.add({"is_first": True})
    replay.add(rows[0])
    with pytest.raises(EpisodeError, match="image: must be in every row, with the same shape"):
        replay.add(rows[4] | {"image": np.zeros((2, 2, 3), np.uint8)})
    replay.add({key: value for key, value in rows[0].items() if key != "reward"})
    with pytest.raises(EpisodeError, match="reward: is missing"):
        replay.add({key: value for key, value in rows[4].items() if key != "reward"})
    assert add(replay, 4), "a bad episode does no harm to the next"
    assert len(list(tmp_path.glob("*.npz"))) == 1

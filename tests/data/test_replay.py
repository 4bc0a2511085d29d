"""The replay: what it draws and how often, its bounds, damaged folders, and coming back after a crash."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apv_fast.data import VIDEO_KEYS, DiskError, EpisodeError, Replay
from apv_fast.data.frame_cache import FrameCache
from tests.support.replays import add, fill, same
from tests.support.samples import make_episode, rows_of, small_disk, small_files, through_a_file


def test_batches_have_the_promised_form(tmp_path: Path) -> None:
    fill(tmp_path, [20, 30])
    batch = Replay(tmp_path, chunk_length=7).sample(5)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == {
        "image": (torch.uint8, (5, 7, 64, 64, 3)),
        "action": (torch.float32, (5, 7, 2)),
        "reward": (torch.float32, (5, 7)),
        "is_first": (torch.bool, (5, 7)),
        "is_last": (torch.bool, (5, 7)),
        "is_terminal": (torch.bool, (5, 7)),
    }


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=5), chunk=st.integers(1, 12), ends=st.booleans())
def test_every_sequence_is_a_piece_of_one_episode(lengths: list[int], chunk: int, ends: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        fill(directory, lengths)
        replay = Replay(directory, chunk_length=chunk, prioritize_ends=ends, online=True)
        usable = {index: n for index, n in enumerate(lengths) if n + 1 >= chunk}
        assert replay.stats["skipped_short"] == len(lengths) - len(usable)
        if not usable:
            with pytest.raises(EpisodeError, match="none is finished"):
                replay.sample(1)
            return
        batch = replay.sample(16)
    for b in range(16):
        episode, start = divmod(int(batch["reward"][b, 0]), 1000)
        whole = make_episode(usable[episode], seed=episode)
        for key, value in batch.items():
            if key != "is_first":
                np.testing.assert_array_equal(value[b].numpy(), whole[key][start : start + chunk])
        assert batch["is_first"][b].tolist() == [True] + [False] * (chunk - 1)


def starts(replay: Replay, draws: int) -> np.ndarray:
    """How often each start was drawn."""
    rewards = torch.cat([replay.sample(500)["reward"][:, 0] for _ in range(draws // 500)])
    return np.bincount(rewards.numpy().astype(int) % 1000)


@pytest.mark.parametrize("ends", [False, True])
def test_starts_follow_the_stated_distribution(tmp_path: Path, ends: bool) -> None:
    frames, chunk, draws = 12, 5, 8000
    fill(tmp_path, [frames - 1])
    counts = starts(Replay(tmp_path, chunk_length=chunk, prioritize_ends=ends, seed=1), draws)
    places = frames - chunk + 1
    expected = np.full(places, 1 / places)
    if ends:
        last = (chunk + 1) / (frames - chunk + 1 + chunk)
        expected[:] = (1 - last) / (places - 1)
        expected[-1] = last
    chi2 = ((counts - draws * expected) ** 2 / (draws * expected)).sum()
    assert chi2 < 24.3, "a right sampler is above this once in a thousand seeds (7 degrees of freedom)"


def test_episodes_are_drawn_alike_whatever_their_length(tmp_path: Path) -> None:
    fill(tmp_path, [6, 60])
    reward = torch.cat([Replay(tmp_path, chunk_length=5, seed=seed).sample(200)["reward"][:, 0] for seed in range(10)])
    assert abs((reward >= 1000).float().mean() - 0.5) < 0.05


def test_a_seed_fixes_the_draws(tmp_path: Path) -> None:
    fill(tmp_path, [20, 30, 25])
    first, second, other = (Replay(tmp_path, chunk_length=6, seed=seed) for seed in (4, 4, 5))
    assert same(first.sample(8), second.sample(8))
    assert not same(first.sample(8), other.sample(8))


def test_pretraining_never_sees_an_action(tmp_path: Path) -> None:
    fill(tmp_path / "videos", [10], video_only=True)
    fill(tmp_path / "run" / "train_episodes", [12], actions=3)
    replay = Replay([tmp_path / "videos", tmp_path / "run"], chunk_length=5, keys=VIDEO_KEYS)
    assert replay.stats["episodes"] == 2
    assert set(replay.sample(4)) == set(VIDEO_KEYS)
    with pytest.warns(UserWarning, match="action: is missing"):
        assert Replay([tmp_path / "videos", tmp_path / "run"], chunk_length=5).stats["episodes"] == 1


def test_the_newest_steps_are_kept(tmp_path: Path) -> None:
    fill(tmp_path, [10, 10, 10, 10])
    replay = Replay(tmp_path, chunk_length=5, capacity_steps=25, online=True)
    assert replay.stats["steps"] == 20
    assert set((replay.sample(200)["reward"][:, 0] // 1000).int().tolist()) == {2, 3}
    add(replay, 12, seed=7)
    assert set((replay.sample(200)["reward"][:, 0] // 1000).int().tolist()) == {3, 7}
    assert len(list(tmp_path.glob("*.npz"))) == 5, "files are never deleted"
    add(replay, 40, seed=8)
    assert replay.stats["steps"] == 40, "the newest episode stays even if it alone is above the capacity"


def test_memory_and_cache_stay_bounded(tmp_path: Path) -> None:
    """Ten times the capacity goes through in episodes of all lengths; the decoded frames' file stays near it."""
    replay = Replay(tmp_path, chunk_length=5, capacity_steps=500, online=True)
    for index in range(250):
        add(replay, 10 + index * 8 % 21)
    assert replay.stats["total_steps"] > 4900
    frame = 64 * 64 * 3
    assert replay.stats["cache_bytes"] <= 1.25 * 500 * frame
    assert sum(value.nbytes for value in replay.sample(1).values()) < 2 * 5 * frame


def test_damaged_files_are_skipped_counted_and_named(tmp_path: Path) -> None:
    paths = fill(tmp_path, [10, 11, 12, 13, 3])
    paths[0].write_bytes(paths[0].read_bytes()[:500])
    np.savez(paths[1], **make_episode(11) | {"reward": np.zeros(3, np.float32)})  # type: ignore[arg-type]
    np.savez(paths[2], **make_episode(12, actions=5))  # type: ignore[arg-type]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        replay = Replay(tmp_path, chunk_length=5)
    messages = [str(one.message) for one in caught]
    assert len(messages) == 3
    assert f"{paths[0]}: archive: cannot be read" in messages[2]
    assert f"{paths[1]}: reward: must have 12 rows" in messages[1]
    assert "action: must be float32 [2] a step, as in the other episodes, not float32 [5]" in messages[0]
    stats = replay.stats
    assert (stats["episodes"], stats["skipped_damaged"], stats["skipped_short"]) == (1, 3, 1)
    replay.sample(2)


def test_a_folder_without_a_usable_episode(tmp_path: Path) -> None:
    with pytest.raises(EpisodeError, match=r"nowhere: folder: does not exist"):
        Replay(tmp_path / "nowhere", chunk_length=5)
    fill(tmp_path, [3])
    with pytest.raises(EpisodeError, match=r"none is usable \(0 damaged, 1 with fewer than 5 frames\)"):
        Replay(tmp_path, chunk_length=5)


def test_only_finished_episodes_are_drawn_and_short_ones_counted(tmp_path: Path) -> None:
    replay = Replay(tmp_path / "new", chunk_length=5, online=True)
    assert add(replay, 3) is None
    for row in rows_of(make_episode(9))[:-1]:
        assert replay.add(row) is None
    assert replay.stats["episodes"] == 0
    assert replay.stats["skipped_short"] == 1
    path = replay.add(rows_of(make_episode(9))[-1])
    assert path and path.exists()
    assert replay.stats["episodes"] == 1
    assert replay.ongoing() == []


def test_a_frame_buffer_that_the_environment_reuses(tmp_path: Path) -> None:
    replay = Replay(tmp_path, chunk_length=5, online=True)
    buffer = np.zeros((64, 64, 3), np.uint8)
    for row in rows_of(make_episode(6)):
        buffer[:] = row["image"]
        replay.add(row | {"image": buffer})
    assert torch.equal(replay.sample(1)["image"][0, :, 0, 0, 0].diff(), torch.ones(4, dtype=torch.uint8))


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    noisy = make_episode(60)
    noisy["image"] = np.random.default_rng(0).integers(0, 256, noisy["image"].shape, dtype=np.uint8)
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk, "600k"):
        replay = Replay(disk, chunk_length=5, online=True, cache_directory=tmp_path)
        add(replay, 10, seed=1)
        for row in rows_of(noisy)[:-1]:
            replay.add(row)
        with pytest.raises(DiskError, match="cannot write"):
            replay.add(rows_of(noisy)[-1])
        with pytest.raises(DiskError, match="cannot write"):
            replay.finish()
        with pytest.raises(DiskError, match="cannot write"):
            replay.add(rows_of(noisy)[0])  # the next episode does not push it out
        assert replay.stats["episodes"] == 1
        assert int(replay.sample(1)["reward"][0, 0]) // 1000 == 1
        state = through_a_file(replay.state_dict())
        replay.directories[0] = tmp_path  # "some space was freed"
        path = replay.finish()
        assert path and replay.stats["episodes"] == 2
    np.testing.assert_array_equal(state["ongoing"]["0"]["image"].numpy(), noisy["image"])


def test_a_full_cache_disk_loses_nothing(tmp_path: Path) -> None:
    replay = Replay(tmp_path, chunk_length=5, online=True)
    add(replay, 10, seed=1)
    with small_files(400_000), pytest.raises(DiskError, match=r"cannot write .*decoded frames"):
        add(replay, 100, seed=2)
    assert len(replay.ongoing()) == 101
    assert replay.finish(), "once there is space again"
    assert set((replay.sample(200)["reward"][:, 0] // 1000).int().tolist()) == {1, 2}


def test_resuming_is_exact(tmp_path: Path) -> None:
    """Killed after the checkpoint, with episodes finished since: the same draws follow as if nothing had happened."""
    whole = Replay(tmp_path / "a", chunk_length=5, online=True, seed=3, capacity_steps=60)
    for index in range(4):
        add(whole, 12 + index, seed=index)
    whole.sample(7)
    for row in rows_of(make_episode(9, seed=9))[:4]:
        whole.add(row)
    state = through_a_file(whole.state_dict())

    def go_on(replay: Replay) -> list[dict[str, torch.Tensor]]:
        batches = [replay.sample(4)]
        for row in rows_of(make_episode(9, seed=9))[4:]:
            replay.add(row)
        batches.append(replay.sample(4))
        add(replay, 20, seed=10)
        return [*batches, replay.sample(4)]

    uninterrupted = go_on(whole)
    files = sorted((tmp_path / "a").glob("*.npz"))
    for seed in (0, 1):
        resumed = Replay(tmp_path / "a", chunk_length=5, online=True, seed=seed, capacity_steps=60)
        newer = resumed.load_state_dict(state)
        assert newer == 2 * (seed + 1), "the episodes that the others finished after the checkpoint"
        assert len(resumed.ongoing()) == 4
        assert (resumed.stats["total_steps"], resumed.stats["total_episodes"]) == (54, 4)
        assert all(same(one, other) for one, other in zip(uninterrupted, go_on(resumed), strict=True))
        assert set(files) <= set((tmp_path / "a").glob("*.npz")), "a crash loses no finished episode"


def test_resuming_without_an_episode_of_the_checkpoint(tmp_path: Path) -> None:
    paths = fill(tmp_path, [10, 11])
    state = Replay(tmp_path, chunk_length=5).state_dict()
    paths[0].unlink()
    with pytest.raises(EpisodeError, match=rf"{paths[0].name}: archive: cannot be read \(FileNotFound"):
        Replay(tmp_path, chunk_length=5).load_state_dict(state)


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=40), seed=st.integers(0, 1000))
def test_frame_store_never_mixes_runs(sizes: list[int], seed: int) -> None:
    """Runs come and go in any order; each stays what was written, and freed space is used again."""
    generator = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as directory:
        store = FrameCache(Path(directory), frame_bytes=6)
        held: dict[int, np.ndarray] = {}
        for value, size in enumerate(sizes):
            frames = np.full((size, 2, 3), value, np.uint8)
            held[store.write(frames)] = frames
            for place in [place for place in held if generator.random() < 0.4]:
                store.free(place, len(held.pop(place)))
        for place, frames in held.items():
            out = np.empty_like(frames)
            store.read_into(place, out)
            np.testing.assert_array_equal(out, frames)
            store.free(place, len(frames))
        assert len(store._free) == 1, "neighbours are merged"
        assert list(Path(directory).iterdir()) == [], "the file has no name"
        end = store.file_bytes
        assert store.write(np.zeros((end // 6, 2, 3), np.uint8)) == 0
        assert store.file_bytes == end
        store.close()


@pytest.mark.parametrize("options", [{"chunk_length": 0}, {"chunk_length": 5, "capacity_steps": 0}])
def test_bad_sizes(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Replay(tmp_path, **options)  # type: ignore[arg-type]


def test_bad_keys(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keys must include image"):
        Replay(tmp_path, chunk_length=5, keys=("is_first", "reward"))

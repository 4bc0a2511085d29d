"""What pre-training reads: mixtures, the split, reading ahead, damage, memory, resuming."""

from __future__ import annotations

import json
import os
import threading
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apv_fast.data import DeviceRows, EpisodeError, Prefetcher, StoreWriter, VideoDataset
from apv_fast.data.collect_writers import EpisodeWriter, NpzWriter, VideoStoreWriter
from apv_fast.data.corpus import StoreCorpus
from apv_fast.data.mixture import Entry, parse_entries
from apv_fast.data.store_format import INDEX_FILE, StoredEpisode, shard_file
from apv_fast.data.validation_split import held_out
from tests.support.samples import make_episode, through_a_file
from tests.support.video_sources import LENGTH, chi_square, drawn, make_folder, make_store, open_, video, who

# What --data says


def test_entries() -> None:
    assert parse_entries(["a", Path("b:c")]) == [Entry(Path("a")), Entry(Path("b:c"))]
    weighted = parse_entries(["a:0.7", "b:c:3", "d:.5", "e:1e-2"])
    assert weighted == [Entry(Path("a"), 0.7), Entry(Path("b:c"), 3), Entry(Path("d"), 0.5), Entry(Path("e"), 0.01)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "there is no entry"),
        (["a:0.7", "b"], "b has no weight but others have; give all entries one"),
        (["a:0"], "the weight of a is 0; it must be a positive number"),
        (["a:-1"], "the weight of a is -1"),
        (["a:1e999"], "the weight of a is inf"),
        (["a", "b", "a"], "a is there twice; name it once"),
        (["a:1", "a:2"], "a is there twice"),
    ],
)
def test_entries_that_are_wrong(values: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_entries(values)


def test_places_without_videos(tmp_path: Path) -> None:
    make_store(tmp_path / "store", [3, 4])
    with pytest.raises(EpisodeError, match=r"nowhere: data: does not exist"):
        open_(tmp_path / "nowhere")
    with pytest.raises(EpisodeError, match=r"store: episodes: none is usable \(0 damaged, 2 with fewer than 5 frames"):
        open_(tmp_path / "store")
    make_folder(tmp_path / "folder", [9])
    assert open_(tmp_path / "store", tmp_path / "folder").stats["episodes"] == 1
    with pytest.raises(EpisodeError, match="store: episodes: none is usable"):
        open_(f"{tmp_path / 'store'}:1", f"{tmp_path / 'folder'}:1")
    with pytest.raises(ValueError, match="validation is 1; it must be at least 0 and less than 1"):
        open_(tmp_path / "folder", validation=1)


# How often what is drawn


def test_without_weights_all_episodes_are_drawn_alike(tmp_path: Path) -> None:
    dataset = open_(make_store(tmp_path / "a", [9, 30]), make_folder(tmp_path / "b", [12, 9, 15, 5]), seed=1)
    draws = drawn(dataset, 3000)
    counts = [int(((draws[:, :2] == pair).all(1)).sum()) for pair in [(0, 0), (0, 1), *((1, e) for e in range(4))]]
    assert chi_square(counts, [1 / 6] * 6) < 20.5, "a right sampler is above this once in a thousand seeds"


def test_weights_are_those_of_the_sources(tmp_path: Path) -> None:
    data = make_store(tmp_path / "a", [9]), make_folder(tmp_path / "b", [9] * 3), make_store(tmp_path / "c", [9], 2)
    draws = drawn(open_(f"{data[0]}:3.5", f"{data[1]}:1", f"{data[2]}:.5", seed=2), 3000)
    assert chi_square(np.bincount(draws[:, 0]), [0.7, 0.2, 0.1]) < 13.8
    assert chi_square(np.bincount(draws[draws[:, 0] == 1, 1]), [1 / 3] * 3) < 13.8


@pytest.mark.parametrize("ends", [False, True])
def test_starts_follow_the_stated_distribution(tmp_path: Path, ends: bool) -> None:
    frames = 12
    draws = drawn(open_(make_store(tmp_path, [frames]), prioritize_ends=ends, seed=3), 4000)
    places = frames - LENGTH + 1
    shares = np.full(places, 1 / places)
    if ends:
        last = (LENGTH + 1) / (frames + 1)
        shares[:] = (1 - last) / (places - 1)
        shares[-1] = last
    assert chi_square(np.bincount(draws[:, 2]), shares) < 24.3


def test_a_batch(tmp_path: Path) -> None:
    batch = open_(make_store(tmp_path, [9])).sample(3)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == {
        "image": (torch.uint8, (3, LENGTH, 64, 64, 3)),
        "is_first": (torch.bool, (3, LENGTH)),
    }
    assert batch["is_first"].tolist() == [[True] + [False] * (LENGTH - 1)] * 3


def test_the_newest_steps_of_folders_are_read(tmp_path: Path) -> None:
    folders = make_folder(tmp_path / "a", [11] * 2), make_folder(tmp_path / "b", [11] * 3, 2)
    dataset = open_(*folders, make_store(tmp_path / "c", [50]), capacity_steps=45)
    assert dataset.stats["episodes"] == 4 + 1, "a store does not count"
    draws = {(int(s), int(e)) for s, e, _ in drawn(dataset, 300)}
    assert draws == {(1, 1), (2, 0), (2, 1), (2, 2), (0, 0)}


# The split


def test_the_split_depends_on_the_frames_alone(tmp_path: Path) -> None:
    lengths = [7] * 60
    store, folder = make_store(tmp_path / "a", lengths, 3), make_folder(tmp_path / "b", lengths, 3)

    def sides(*data: Path, **options: Any) -> tuple[set[int], set[int]]:
        dataset = open_(*data, validation=0.3, **options)
        trained = drawn(dataset, 3000)
        shown = np.concatenate([who(batch) for batch in dataset.fixed(100, 10)])
        return set(trained[trained[:, 0] == 3, 1].tolist()), set(shown[shown[:, 0] == 3, 1].tolist())

    train, held = sides(store)
    assert not train & held and train | held == set(range(60))
    assert 8 <= len(held) <= 28, "a right split of 60 by 0.3 is outside once in a thousand"
    other = make_store(tmp_path / "other", lengths, 4)
    assert sides(folder) == sides(other, store, seed=5) == (train, held)


@pytest.mark.parametrize("kind", ["npz", "store"])
def test_views_of_an_episode_stay_together(kind: str, tmp_path: Path) -> None:
    """As ``apv-fast collect`` writes them: the source of a video is its camera here."""
    output: EpisodeWriter = NpzWriter(tmp_path, "20260101T000000", "of a test")
    if kind == "store":
        output = VideoStoreWriter(tmp_path, 30.0, "fast", 64, {})
    rows = {key: value for key, value in make_episode(6, video_only=True).items() if key != "image"}
    for index in range(30):
        output.write(index, {f"camera{view}": video(view, index, 7) for view in range(3)}, rows)
    output.close()
    dataset = open_(tmp_path, validation=0.3)
    train = {(int(s), int(e)) for s, e, _ in drawn(dataset, 5000)}
    held = {(int(s), int(e)) for batch in dataset.fixed(100, 30) for s, e, _ in who(batch)}
    assert train | held == {(view, index) for view in range(3) for index in range(30)} and not train & held
    assert 1 < len({index for _, index in held}) < 29
    assert not {index for _, index in train} & {index for _, index in held}


def test_each_side_has_an_episode_where_possible() -> None:
    keys = [np.arange(3), np.arange(3, 4), np.arange(0)]
    for share in (1e-9, 0.999999):
        held = [one.tolist() for one in held_out(keys, share)]
        assert held[1:] == [[], []] and len(held[0]) == (1 if share < 0.5 else 2)
        twice = held_out([np.arange(3).repeat(2)], share)[0].tolist()
        assert twice == [place for one in held[0] for place in (2 * one, 2 * one + 1)], "those of one key together"
    assert [one.tolist() for one in held_out(keys, 0.0)] == [[], [], []]
    assert [one.tolist() for one in held_out([np.zeros(3, int)], 0.5)] == [[]]


def test_the_fixed_batches_are_fixed(tmp_path: Path) -> None:
    dataset = open_(make_store(tmp_path, [30] * 10), validation=0.2)
    before = [who(batch) for batch in dataset.fixed(4, 3)]
    position = dataset.position
    drawn(dataset, 100)
    again = [who(batch) for batch in open_(tmp_path, validation=0.2, seed=9).fixed(4, 3)]
    assert np.array_equal(before, [who(batch) for batch in dataset.fixed(4, 3)])
    assert np.array_equal(before, again)
    assert not np.array_equal(before[0], before[1])
    list(dataset.fixed(4, 3))
    assert dataset.position != position
    untouched = open_(tmp_path, validation=0.2)
    list(untouched.fixed(4, 3))
    assert untouched.position == position, "they take nothing from the draws of training"


def test_without_held_out_episodes_the_others_are_shown(tmp_path: Path) -> None:
    dataset = open_(make_store(tmp_path, [9, 9]))
    assert dataset.stats["held_out"] == 0
    assert {int(e) for batch in dataset.fixed(20) for e in who(batch)[:, 1]} == {0, 1}


# Reading ahead, and coming back


def store_and_folder(folder: Path, **options: Any) -> VideoDataset:
    if not (folder / "a").exists():
        make_store(folder / "a", [9, 30, 12])
        make_folder(folder / "b", [12, 9])
    return open_(f"{folder / 'a'}:2", f"{folder / 'b'}:1", validation=0.1, prioritize_ends=True, **options)


def test_reading_ahead_changes_nothing(tmp_path: Path) -> None:
    plain = store_and_folder(tmp_path, seed=4)
    expected = [plain.sample(6) for _ in range(30)]
    for ahead in (0, 1, 5):
        with Prefetcher(store_and_folder(tmp_path, seed=4), 6, ahead) as videos:
            batches = [videos.next() for _ in range(30)]
            for one, other in zip(batches, expected, strict=True):
                assert all(torch.equal(one[key], other[key]) for key in expected[0])
    with pytest.raises(ValueError, match="prefetch is -1; it must be at least 0"):
        Prefetcher(plain, 6, -1)


@pytest.mark.parametrize(("before", "after"), [(3, 0), (0, 3), (3, 2)])
def test_resuming_draws_again_what_was_only_read_ahead(tmp_path: Path, before: int, after: int) -> None:
    with Prefetcher(store_and_folder(tmp_path, seed=4), 6, before) as videos:
        fresh = through_a_file(videos.state_dict())
        first = [who(videos.next()) for _ in range(4)]
        state = through_a_file(videos.state_dict())
        expected = [who(videos.next()) for _ in range(8)]
        videos.load_state_dict(state)
        assert np.array_equal([who(videos.next()) for _ in range(8)], expected), "turned back while reading ahead"
    # Videos that came since are not drawn.
    with StoreWriter(tmp_path / "a", creator="test") as writer:
        writer.append("0/0000b", video(7, 0, 20))
    make_folder(tmp_path / "b", [25], 8)
    with Prefetcher(store_and_folder(tmp_path, seed=5), 6, after) as videos:
        videos.load_state_dict(state)
        assert np.array_equal([who(videos.next()) for _ in range(8)], expected)
        videos.load_state_dict(fresh)
        assert np.array_equal([who(videos.next()) for _ in range(4)], first)


def test_resuming_without_a_video_of_the_checkpoint(tmp_path: Path) -> None:
    state = store_and_folder(tmp_path).state_dict()
    gone = max((tmp_path / "b").iterdir())
    gone.unlink()
    with pytest.raises(EpisodeError, match=gone.name):
        store_and_folder(tmp_path).load_state_dict(state)
    state["episodes"] = {"a": ["0/0000", "0/nine"], "b": []}
    with pytest.raises(EpisodeError, match="0/nine: is in the checkpoint and not in the store"):
        store_and_folder(tmp_path).load_state_dict(state)


def test_frames_are_read_by_another_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readers = set()
    read = VideoDataset.read

    def watched(self: VideoDataset, *arguments: Any, **options: Any) -> dict[str, torch.Tensor]:
        readers.add(threading.current_thread().name)
        return read(self, *arguments, **options)

    monkeypatch.setattr(VideoDataset, "read", watched)
    with Prefetcher(store_and_folder(tmp_path), 6, 2) as videos:
        videos.next()
        assert readers == {"prefetch_0"}
        assert 0 < videos.take_wait() <= 1
    assert not any(thread.name == "prefetch_0" for thread in threading.enumerate())


def test_an_error_of_the_reader_comes_out(tmp_path: Path) -> None:
    make_store(tmp_path / "s", [9])
    with Prefetcher(open_(tmp_path / "s"), 2, 2) as videos:
        (tmp_path / "s" / shard_file(0)).write_bytes(b"")
        with pytest.raises(EpisodeError, match="ends before byte"):
            for _ in range(4):
                videos.next()


# Damage


def test_damaged_and_short_episodes_are_skipped_counted_and_named(tmp_path: Path) -> None:
    store, folder = make_store(tmp_path / "a", [9, 10, 3]), make_folder(tmp_path / "b", [11, 9, 2])
    with (store / shard_file(0)).open("r+b") as file:
        file.seek(9 * 64 * 64 * 3 + 5000)  # in the second episode
        file.write(b"\xff\xfe")
    damaged = min(folder.iterdir())
    damaged.write_bytes(damaged.read_bytes()[:100])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = open_(store, folder)
    messages = sorted(str(one.message) for one in caught)
    assert len(messages) == 2
    assert f"{store}: 0/0001: its frames are not those that were written (checksum)" in messages[0]
    assert str(damaged) in messages[1]
    assert dataset.stats == {
        "episodes": 2,
        "frames": 18,
        "held_out": 0,
        "skipped_short": 2,
        "skipped_damaged": 2,
    }
    assert dataset.description == (
        "2 episodes (18 frames), 2 skipped (below 5 frames), 2 skipped (damaged), from the host"
    )
    assert {(int(s), int(e)) for s, e, _ in drawn(dataset, 200)} == {(0, 0), (1, 1)}
    assert StoreCorpus(store, verify_bytes=0).skipped_damaged == 0, "large stores are taken at their word"


def test_frames_of_another_size(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, height=32, width=32, creator="test") as writer:
        writer.append("a", np.zeros((9, 32, 32, 3), np.uint8))
    with pytest.raises(EpisodeError, match=r"frames: must be \[64, 64, 3\], not \[32, 32, 3\]"):
        open_(tmp_path)


def test_qualities(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "b" / "train_episodes", [9]).parent
    (folder / "dataset.json").write_text('{"world": {"quality": "paper"}}')
    unknown = make_folder(tmp_path / "c", [9])
    assert open_(unknown).qualities == set()
    assert open_(make_store(tmp_path / "a", [9], quality="fast"), folder, unknown).qualities == {"fast", "paper"}


# Memory


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_a_store_larger_than_memory_is_read_with_little_of_it(tmp_path: Path) -> None:
    """100 GB of frames that take no disk: holes in files."""
    make_store(tmp_path, [1])
    frames, episodes, frame = 2000, 4070, 64 * 64 * 3
    with (tmp_path / INDEX_FILE).open("a") as index:
        for number in range(episodes):
            line = StoredEpisode(f"1/{number:04d}", 1 + number // 40, number % 40 * frames * frame, frames, number)
            index.write(json.dumps(asdict(line)) + "\n")
    for shard in range(1, 2 + (episodes - 1) // 40):
        with (tmp_path / shard_file(shard)).open("wb") as file:
            file.truncate(40 * frames * frame)
    dataset = open_(tmp_path, validation=0.05)
    assert dataset.stats["frames"] * frame > 90e9 and 100 < dataset.stats["held_out"] < 320
    with Prefetcher(dataset, 16, 2) as videos:
        videos.next()
        before = resident_mib()
        for _ in range(200):
            videos.next()
        assert resident_mib() - before < 64


# A copy on the device

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.gpu
def test_the_device_gives_the_batches_of_the_host(tmp_path: Path) -> None:
    host = store_and_folder(tmp_path, seed=6)
    device = store_and_folder(tmp_path, seed=6, rows=DeviceRows(DEVICE))
    expected = [host.sample(8) for _ in range(5)]
    with Prefetcher(device, 8, 2) as videos:
        for batch in expected:
            other = videos.next()
            assert {value.device.type for value in other.values()} == {DEVICE.type}
            assert all(torch.equal(batch[key], other[key].cpu()) for key in batch)
        assert device.description.endswith(f"from {DEVICE}")
        for one, two in zip(host.fixed(4, 2), device.fixed(4, 2), strict=True):
            assert torch.equal(one["image"], two["image"])


@pytest.mark.gpu
def test_what_does_not_fit_on_the_device_comes_from_the_host(tmp_path: Path) -> None:
    host = store_and_folder(tmp_path, seed=6)
    small = store_and_folder(tmp_path, seed=6, rows=DeviceRows(DEVICE, 20 * 64 * 64 * 3))
    assert np.array_equal(who(host.sample(8)), who(small.sample(8)))
    assert small.description.endswith("from the host")
    with pytest.raises(MemoryError, match="use --replay-device host"):
        store_and_folder(tmp_path, rows=DeviceRows(DEVICE, 20 * 64 * 64 * 3, strict=True)).sample(1)

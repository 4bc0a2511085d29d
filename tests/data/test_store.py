"""The store of videos: what is in its index is complete, whatever happened; reading needs no memory."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apv_fast.atomic_file import DiskError
from apv_fast.data.store import StoredEpisode, StoreError, StoreWriter, VideoStore, is_store
from apv_fast.data.store_format import INDEX_FILE, STORE_FILE, shard_file
from tests.support.samples import small_files

SHAPE = (8, 6, 3)
FRAME = 8 * 6 * 3


def frames(seed: int, count: int = 10) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), dtype=np.uint8)


def writer(path: Path, *, shard_bytes: int = 25 * FRAME, settings: dict[str, Any] | None = None) -> StoreWriter:
    return StoreWriter(path, height=8, width=6, creator="test", settings=settings, shard_bytes=shard_bytes)


def fill(path: Path, seeds: range, **kwargs: Any) -> Path:
    with writer(path, **kwargs) as store:
        for seed in seeds:
            store.append(f"{seed:03d}", frames(seed), fps=float(seed), source={"path": f"/{seed}.mp4"})
    return path


def expect(path: Path, seeds: range) -> None:
    """The store has exactly these episodes, whole."""
    store = VideoStore(path)
    assert [episode.name for episode in store] == [f"{seed:03d}" for seed in seeds]
    for episode, seed in enumerate(seeds):
        np.testing.assert_array_equal(store.read(episode), frames(seed))
    assert [ok for _, ok in store.verify()] == [True] * len(seeds)


# Round trip


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "store"
    assert not is_store(path)
    with writer(path) as store:
        assert store.append("b", frames(1, 3), fps=30, camera="corner", quality="fast", source={"path": "b.mp4"}) == (
            StoredEpisode("b", 0, 0, 3, zlib.crc32(frames(1, 3).tobytes()), 30, "corner", "fast", {"path": "b.mp4"})
        )
        store.append("a", frames(2, 12))
        store.append("é\udcff\n", frames(3, 40))  # does not fit into the first shard, is larger than a shard
        store.append("d", frames(4, 1))
        assert "a" in store and "c" not in store and len(store) == 4
    assert is_store(path)
    assert sorted(one.name for one in path.glob("*.bin")) == [shard_file(shard) for shard in range(3)]

    store_ = VideoStore(path)
    assert [one.name for one in store_] == ["a", "b", "d", "é\udcff\n"]
    assert store_.lengths.tolist() == [12, 3, 1, 40] and store_.lengths.dtype == np.int64
    assert store_.image_shape == SHAPE and len(store_) == 4
    assert store_[1] == StoredEpisode("b", 0, 0, 3, store_[1].crc32, 30, "corner", "fast", {"path": "b.mp4"})
    np.testing.assert_array_equal(store_.read(3), frames(3, 40))
    np.testing.assert_array_equal(store_.read(3, 37, 3), frames(3, 40)[37:])
    out = np.zeros((2, *SHAPE), np.uint8)
    store_.read_into(0, 10, out)
    np.testing.assert_array_equal(out, frames(2, 12)[10:])


def test_frames_may_be_a_memory_map_and_not_contiguous(tmp_path: Path) -> None:
    frames(5, 20).tofile(tmp_path / "raw")
    mapped = np.memmap(tmp_path / "raw", np.uint8, "r", shape=(20, *SHAPE))
    with writer(tmp_path / "store") as store:
        store.append("mapped", mapped)
        store.append("strided", frames(5, 20)[::-2])
    store_ = VideoStore(tmp_path / "store")
    np.testing.assert_array_equal(store_.read(0), mapped)
    np.testing.assert_array_equal(store_.read(1), frames(5, 20)[::-2])
    assert all(ok for _, ok in store_.verify())


def test_reading_outside_of_an_episode(tmp_path: Path) -> None:
    store = VideoStore(fill(tmp_path / "store", range(3)))
    for start, count in ((8, 3), (-1, 2), (11, 1)):
        with pytest.raises(ValueError, match="episode 1 has 10 frames, not those from"):
            store.read(1, start, count)
    with pytest.raises(ValueError, match=r"must be uint8 \[n, 8, 6, 3\], not float32"):
        store.read_into(0, 0, np.zeros((2, *SHAPE), np.float32))
    with pytest.raises(ValueError, match="not uint8"):
        store.read_into(0, 0, np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(IndexError):
        store.read(3)


def test_appending_goes_on_in_the_last_shard(tmp_path: Path) -> None:
    path = fill(tmp_path / "store", range(3))
    fill(path, range(3, 7))
    expect(path, range(7))
    assert len(list(path.glob("*.bin"))) == 4  # two episodes each


def test_readers_see_what_there_was_when_they_opened(tmp_path: Path) -> None:
    path = fill(tmp_path / "store", range(1, 3))
    store = VideoStore(path)
    store.read(0)
    fill(path, range(1))  # sorts before the others
    again = pickle.loads(pickle.dumps(store))
    for one in (store, again):
        assert len(one) == 2 and one[0].name == "001"
        np.testing.assert_array_equal(one.read(0), frames(1))
    expect(path, range(3))


def test_spawned_workers_and_threads_read(tmp_path: Path) -> None:
    store = VideoStore(fill(tmp_path / "store", range(6)))
    expected = [frames(seed).sum() for seed in range(6)]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        assert list(pool.map(_sum, [store] * 6, range(6))) == expected
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        assert list(threads.map(_sum, [store] * 60, [*range(6)] * 10)) == expected * 10


def _sum(store: VideoStore, episode: int) -> int:
    return int(store.read(episode).sum())


def test_more_shards_than_files_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apv_fast.data.store.OPEN_SHARDS", 20)
    count = 50
    store = VideoStore(fill(tmp_path / "store", range(count), shard_bytes=1))
    before = len(os.listdir("/proc/self/fd"))
    for episode in [*range(count), *range(count)]:
        store.read(episode, 0, 1)
    assert len(os.listdir("/proc/self/fd")) <= before + 20
    del store
    assert len(os.listdir("/proc/self/fd")) <= before


# Crashes, full disks


def test_what_a_killed_writer_left_is_cut_off(tmp_path: Path) -> None:
    path = fill(tmp_path / "store", range(3))  # shards of 2 and 1 episodes
    with (path / shard_file(1)).open("ab") as shard:
        shard.write(b"x" * 1000)  # frames of an episode that did not come to its end
    (path / shard_file(2)).write_bytes(b"y" * 5)
    line = (path / INDEX_FILE).read_bytes().splitlines()[0]
    with (path / INDEX_FILE).open("ab") as index:
        index.write(line.replace(b'"/0.mp4"', b'"' + b"x" * 1000)[:-9])  # longer than the line that comes in its place
    expect(path, range(3))
    writer(path).close()
    assert not (path / shard_file(2)).exists()
    fill(path, range(3, 6))
    expect(path, range(6))
    undisturbed = fill(tmp_path / "undisturbed", range(6))
    for file in undisturbed.iterdir():
        assert (path / file.name).read_bytes() == file.read_bytes()


def test_killed_writer(tmp_path: Path) -> None:
    """SIGKILL while it appends; what it said was stored is there, and another writer goes on."""
    path = tmp_path / "store"
    program = textwrap.dedent(
        f"""
        from pathlib import Path
        from tests.data.test_store import frames, writer
        with writer(Path({str(path)!r})) as store:
            for seed in range(len(store), 100000):
                store.append(f"{{seed:03d}}", frames(seed))
                print(seed, flush=True)
        """
    )
    there = 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        assert process.stdout
        said = process.stdout.readline()
        time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        done = int((said + process.stdout.read()).split()[-1])
        process.wait()
        there = len(VideoStore(path))
        assert there in (done + 1, done + 2)
        expect(path, range(there))
    fill(path, range(there, there + 3))
    expect(path, range(there + 3))


def test_full_disk(tmp_path: Path) -> None:
    path = fill(tmp_path / "store", range(1))
    with writer(path, shard_bytes=10**6) as store:
        for seed in range(1, 4):
            with (
                small_files(FRAME * 10 * seed + 50),
                pytest.raises(DiskError, match=r"frames-00000.bin .*File too large"),
            ):
                store.append(f"{seed:03d}", frames(seed))
            assert (path / shard_file(0)).stat().st_size == FRAME * 10 * seed  # gives the space back
            expect(path, range(seed))
            store.append(f"{seed:03d}", frames(seed))
        with writer(tmp_path / "other", shard_bytes=1) as other:  # many index lines, short shards
            for seed in range(20):
                other.append(f"{seed:03d}", frames(seed))
            size = (tmp_path / "other" / INDEX_FILE).stat().st_size
            with small_files(size + 20), pytest.raises(DiskError, match=r"index.jsonl"):
                other.append("020", frames(20))
            assert (tmp_path / "other" / INDEX_FILE).stat().st_size == size
            expect(tmp_path / "other", range(20))
            other.append("020", frames(20))
    expect(path, range(4))
    expect(tmp_path / "other", range(21))


# Damage and misuse


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path = fill(tmp_path / "store", range(5))
    shard = path / shard_file(1)
    data = bytearray(shard.read_bytes())
    data[FRAME * 13] ^= 1
    shard.write_bytes(data)
    assert dict(VideoStore(path).verify()) == {0: True, 1: True, 2: True, 3: False, 4: True}


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = fill(tmp_path / "store", range(5))
    shard, index, description = path / shard_file(1), path / INDEX_FILE, path / STORE_FILE
    store = VideoStore(path)
    os.truncate(shard, FRAME * 20 - 1)
    with pytest.raises(StoreError, match=r"frames-00001.bin: size: has 2879 bytes .* at least 2880"):
        VideoStore(path)
    with pytest.raises(StoreError, match="ends before byte"):
        store.read(3)
    shard.unlink()
    with pytest.raises(StoreError, match="has 0 bytes"):
        VideoStore(path)
    lines = index.read_text().splitlines()
    for bad in ("{", "[]", '{"name": "x"}', lines[1].replace('"fps"', '"hz"')):
        index.write_text("\n".join([lines[0], bad, *lines[2:], ""]))
        for opening in (VideoStore, writer):
            with pytest.raises(StoreError, match=r"index.jsonl: line 2: cannot be read"):
                opening(path)
    for content, problem in (
        ("", "cannot be read"),
        ("{}", "cannot be read"),
        ('{"version": 2, "height": 1, "width": 1, "channels": 1}', "version: must be 1, not 2"),
        ('{"version": 1, "height": 0, "width": 1, "channels": 1}', "must be positive"),
    ):
        description.write_text(content)
        for opening in (VideoStore, writer):
            with pytest.raises(StoreError, match=problem):
                opening(path)
    description.unlink()
    with pytest.raises(StoreError, match="made by apv-fast ingest or collect"):
        VideoStore(path)
    with pytest.raises(StoreError, match="frames are there"):
        writer(path)


def test_last_shard_cut_short_is_not_grown_with_zeros(tmp_path: Path) -> None:
    path = fill(tmp_path / "store", range(3))
    os.truncate(path / shard_file(1), FRAME)
    with pytest.raises(StoreError, match="cut short"):
        writer(path)


def test_what_may_be_appended(tmp_path: Path) -> None:
    with writer(tmp_path / "store") as store:
        store.append("a", frames(0))
        with pytest.raises(StoreError, match="'a' is in the store already"):
            store.append("a", frames(0))
        for wrong in (frames(0)[:0], frames(0)[0], frames(0)[:, :7], frames(0).astype(np.float32)):
            with pytest.raises(StoreError, match=r"b: frames: must be uint8 \[1 or more, 8, 6, 3\]"):
                store.append("b", wrong)
    assert len(VideoStore(tmp_path / "store")) == 1


def test_other_settings_and_a_second_writer(tmp_path: Path) -> None:
    path = tmp_path / "store"
    first = writer(path, settings={"fps": 10, "crop": [1, 2]})
    with pytest.raises(StoreError, match="another process is writing"):
        writer(path, settings={"fps": 10, "crop": (1, 2)})
    first.close()
    writer(path, settings={"fps": 10, "crop": (1, 2)}).close()
    with pytest.raises(StoreError, match="fps: is 10 in the store and 20 now; choose another folder"):
        writer(path, settings={"fps": 20, "crop": (1, 2)})
    with pytest.raises(StoreError, match="crop: is"):
        writer(path, settings={"fps": 10})
    with pytest.raises(StoreError, match="creator: is 'test' in the store and 'me' now"):
        StoreWriter(path, height=8, width=6, creator="me", settings={"fps": 10, "crop": [1, 2]})
    with pytest.raises(StoreError, match="height: is 8 in the store and 64 now"):
        StoreWriter(path, width=6, creator="test", settings={"fps": 10, "crop": [1, 2]})


def test_empty_store(tmp_path: Path) -> None:
    writer(tmp_path / "store").close()
    store = VideoStore(tmp_path / "store")
    assert len(store) == 0 and list(store) == [] and list(store.verify()) == []


# Size


def test_hundred_gigabytes_need_no_memory(tmp_path: Path) -> None:
    """Sparse files, 27,000 episodes of 300 frames: reading at random leaves the process's memory where it was."""
    path, episode_bytes = tmp_path / "store", 300 * 64 * 64 * 3
    StoreWriter(path, creator="test").close()
    per_shard, shards = 2**30 // episode_bytes, 93
    line = json.loads('{"crc32": 1234567890, "fps": 30.0, "camera": null, "quality": null}')
    with (path / INDEX_FILE).open("w") as index:
        for number in range(per_shard * shards):
            shard, row = divmod(number, per_shard)
            place = {"name": f"videos/{number:07d}.mp4", "shard": shard, "offset": row * episode_bytes, "frames": 300}
            index.write(json.dumps(line | place | {"source": {"path": f"/data/videos/{number:07d}.mp4"}}) + "\n")
    for shard in range(shards):
        with (path / shard_file(shard)).open("wb") as file:
            file.truncate(per_shard * episode_bytes)
    program = textwrap.dedent(
        f"""
        import resource
        from pathlib import Path
        import numpy as np
        from apv_fast.data.store import VideoStore
        def memory(kind="Rss"):
            lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(kind + ":")) / 1024
        store, random = VideoStore({str(path)!r}), np.random.default_rng(0)
        assert store.lengths.sum() * 12288 > 97e9
        out = np.empty((50, 64, 64, 3), np.uint8)
        def read(count):
            for episode in random.integers(len(store), size=count):
                store.read_into(episode, int(random.integers(251)), out)
        read(50)
        before = memory()
        read(300)
        print(memory() - before)
        """
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 8, f"{run.stdout} MiB more after reading 184 MB"

"""Videos as shards: what is written, what a stream gives to whom, damage, memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("webdataset")

from apv_fast.cli import main
from apv_fast.data import DiskError, EpisodeError, Prefetcher, StoreError, VideoStore
from apv_fast.data.shards import VideoStream, write_shards
from tests.support.samples import small_files
from tests.support.video_sources import chi_square, make_folder, make_store, open_, who

CHUNK = 10
SHARD_BYTES = 5 * CHUNK * 64 * 64 * 3  # five chunks


def shards_of(folder: Path, lengths: list[int], **options: Any) -> Path:
    store = VideoStore(make_store(folder / "store", lengths, quality="fast"))
    options = {"chunk_frames": CHUNK, "shard_bytes": SHARD_BYTES} | options
    done = list(write_shards(store, folder / "shards", **options))
    assert done == [(i, len(done) - 1) for i in range(len(done))]
    return folder / "shards"


def taken(stream: VideoStream, count: int, length: int) -> np.ndarray:
    """Source, episode and first frame of the next sequences, ``[count, 3]``."""
    batch = np.zeros((count, length, 64, 64, 3), np.uint8)
    for row in batch:
        stream.read_into(row)
    return who({"image": torch.from_numpy(batch)})


def test_every_frame_is_written_in_chunks(tmp_path: Path) -> None:
    shards = shards_of(tmp_path, [25, 10, 4, 41])
    files = sorted(path.name for path in shards.iterdir())
    assert files == ["shards.json", *(f"videos-{i:06d}.tar" for i in range(2))]
    stream = VideoStream(shards / "videos-{000000..000001}.tar", chunk_length=1, buffer_bytes=1)
    out = taken(stream, sum([30, 10, 4, 50]), 1)[:, 1:]
    expected = [(0, t) for start in (0, 8, 15) for t in range(start, start + 10)]
    expected += [(1, t) for t in range(10)] + [(2, t) for t in range(4)]
    expected += [(3, t) for start in (0, 8, 16, 23, 31) for t in range(start, start + 10)]
    assert sorted(map(tuple, out.tolist())) == sorted(expected)
    assert stream.qualities == {"fast"}


def test_the_same_call_goes_on_and_gives_the_same_files(tmp_path: Path) -> None:
    shards = shards_of(tmp_path, [30] * 8)
    contents = {path.name: path.read_bytes() for path in shards.glob("*.tar")}
    assert len(contents) == 5
    (shards / "videos-000003.tar").unlink()
    kept = (shards / "videos-000002.tar").stat().st_mtime_ns
    store = VideoStore(tmp_path / "store")
    interrupted = write_shards(store, shards, chunk_frames=CHUNK, shard_bytes=SHARD_BYTES)
    assert [next(interrupted), next(interrupted)] == [(0, 5), (1, 5)]
    del interrupted
    list(write_shards(store, shards, chunk_frames=CHUNK, shard_bytes=SHARD_BYTES))
    assert {path.name: path.read_bytes() for path in shards.glob("*.tar")} == contents
    assert (shards / "videos-000002.tar").stat().st_mtime_ns == kept
    with pytest.raises(StoreError, match=r"shards\.json: chunk_frames: is 10 there and 9 now"):
        next(write_shards(store, shards, chunk_frames=9, shard_bytes=SHARD_BYTES))
    with pytest.raises(StoreError, match=r"store: folder: is not empty and has no shards\.json"):
        next(write_shards(store, tmp_path / "store"))
    with pytest.raises(ValueError, match="must be positive, not 0"):
        next(write_shards(store, shards, chunk_frames=0))


def test_a_full_disk_leaves_no_half_file(tmp_path: Path) -> None:
    store = VideoStore(make_store(tmp_path / "store", [30] * 8))
    with small_files(SHARD_BYTES // 2), pytest.raises(DiskError, match=r"videos-000000\.tar"):
        list(write_shards(store, tmp_path / "shards", chunk_frames=CHUNK, shard_bytes=SHARD_BYTES))
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["shards.json"]


def test_a_pass_has_all_sequences_once_in_a_mixed_order(tmp_path: Path) -> None:
    shards = shards_of(tmp_path, [CHUNK] * 60)
    stream = VideoStream(shards, chunk_length=4, seed=1)
    first, second = taken(stream, 120, 4), taken(stream, 120, 4)
    for one in (first, second):
        assert np.bincount(one[:, 1]).tolist() == [2] * 60, "two sequences of four frames of each chunk of ten"
        assert set(one[:, 2].tolist()) <= set(range(7)) and len(set(one[:, 2].tolist())) > 3
    assert not np.array_equal(first, second)
    neighbours = np.abs(np.diff(first[:, 1])) == 0
    assert neighbours.mean() < 0.2, "sequences of a chunk do not follow each other"


def test_the_order_is_that_of_seed_and_position(tmp_path: Path) -> None:
    shards = shards_of(tmp_path, [CHUNK] * 40)
    plain = taken(VideoStream(shards, chunk_length=4, seed=1), 50, 4)
    assert np.array_equal(plain, taken(VideoStream(shards, chunk_length=4, seed=1), 50, 4))
    assert not np.array_equal(plain, taken(VideoStream(shards, chunk_length=4, seed=2), 50, 4))
    stream = VideoStream(shards, chunk_length=4, seed=1)
    stream.restart(50)
    assert not np.array_equal(plain, taken(stream, 50, 4))
    stream.restart(0)
    assert np.array_equal(plain, taken(stream, 50, 4))


def test_processes_share_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = shards_of(tmp_path, [CHUNK] * 35)
    monkeypatch.setenv("WORLD_SIZE", "3")
    seen = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        seen.append(set(taken(VideoStream(shards, chunk_length=CHUNK), 30, CHUNK)[:, 1].tolist()))
    assert set.union(*seen) == set(range(35))
    assert sum(map(len, seen)) == 35, "nobody sees what another sees"
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(EpisodeError, match="there are 7 for 8 processes; write smaller ones"):
        VideoStream(shards, chunk_length=CHUNK)


def test_damage_is_skipped_and_counted(tmp_path: Path) -> None:
    shards = shards_of(tmp_path, [CHUNK] * 20)
    files = sorted(shards.glob("*.tar"))
    content = bytearray(files[0].read_bytes())
    content[200_000] ^= 255  # in the frames of the second chunk
    files[0].write_bytes(content)
    files[1].write_bytes(files[1].read_bytes()[:300_000])
    files[2].write_bytes(b"no tar file")
    stream = VideoStream(shards, chunk_length=CHUNK, buffer_bytes=1)
    with pytest.warns(UserWarning, match="skipped a damaged chunk or shard") as caught:
        sequences = taken(stream, 11, CHUNK)
    assert len(set(sequences[:, 1].tolist())) == 11, "four of the first file, two of the second, all of the last"
    assert any("checksum" in str(one.message) for one in caught)
    assert stream.skipped_damaged >= 3


def test_streams_that_give_nothing(tmp_path: Path) -> None:
    shards = shards_of(tmp_path, [7, 9])
    stream = VideoStream(shards, chunk_length=CHUNK)
    with pytest.raises(EpisodeError, match=r"chunks: none is usable \(0 damaged, 2 with fewer than 10 frames\)"):
        taken(stream, 1, CHUNK)
    with pytest.raises(EpisodeError, match=r"shards: 2 of 3 are missing, first .*videos-000001\.tar"):
        VideoStream(shards / "videos-{000000..000002}.tar", chunk_length=2)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ImportError, match=r"shards need webdataset: pip install 'apv-fast\[webdataset\]'"):
        VideoStream(tmp_path / "videos-000000.tar", chunk_length=2)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, out = make_store(tmp_path / "store", [25, 40]), tmp_path / "shards"
    assert main(f"shards {store} --out {out} --chunk-frames 10 --shard-mib 1".split()) == 0
    assert capsys.readouterr().out == f"1 shards: apv-fast pretrain --data '{out}/videos-{{000000..000000}}.tar'\n"
    assert len(taken(VideoStream(out, chunk_length=5), 14, 5)) == 14
    card = (out / "README.md").read_text()
    assert "| episodes | 2, of 25 to 40 frames |" in card and "pieces of at most 10 frames" in card
    assert f"\napv-fast shards --out {out} --chunk-frames 10 --shard-mib 1 {store}\n" in card
    assert (out / "contact_sheet.png").is_file()
    assert main(f"shards {store} --out {out} --chunk-frames 0".split()) == 1
    assert "chunk_frames and shard_bytes must be positive, not 0" in capsys.readouterr().err
    assert main(f"shards {tmp_path} --out {out}".split()) == 1
    assert "store.json: is missing" in capsys.readouterr().err


# In a mixture


def test_a_mixture_with_a_stream(tmp_path: Path) -> None:
    shards = shards_of(tmp_path, [CHUNK] * 20)
    folder = make_folder(tmp_path / "folder", [9, 9], 5)
    data = f"{shards / 'videos-{000000..000003}.tar'}:3", f"{folder}:1"
    expected = who(open_(*data, seed=3).sample(1000))
    assert chi_square(np.bincount(expected[:, 0], minlength=6)[[0, 5]], [0.75, 0.25]) < 10.8
    with Prefetcher(open_(*data, seed=3, validation=0.2), 10, 3) as videos:
        batches = [who(videos.next()) for _ in range(20)]
        state = videos.state_dict()
        assert state["streamed"] == [int((np.concatenate(batches)[:, 0] == 0).sum())]
        assert {int(s) for batch in videos.dataset.fixed(20) for s in who(batch)[:, 0]} == {5}
        after = [who(videos.next()) for _ in range(5)]
    with Prefetcher(open_(*data, seed=3, validation=0.2), 10, 3) as videos:
        assert np.array_equal([who(videos.next()) for _ in range(20)], batches), "reading ahead changes nothing"
        with pytest.warns(UserWarning, match="is a stream and cannot go on where it stopped"):
            videos.load_state_dict(state)
        again = [who(videos.next()) for _ in range(5)]
    with Prefetcher(open_(*data, seed=3, validation=0.2), 10, 0) as videos, pytest.warns(UserWarning, match="stream"):
        videos.load_state_dict(state)
        assert np.array_equal([who(videos.next()) for _ in range(5)], again)
    of_folder = [[one[one[:, 0] == 5] for one in several] for several in (after, again)]
    assert all(np.array_equal(one, other) for one, other in zip(*of_folder, strict=True))
    with pytest.raises(ValueError, match=r"give weights .* it is not known how many episodes .*shards has"):
        open_(shards, folder)


def test_pretraining_from_a_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = shards_of(tmp_path, [CHUNK] * 20)
    sizes = "--model.deter 8 --model.hidden 8 --model.stoch 3 --model.discrete 4 --model.cnn-depth 2 --device cpu"
    command = f"pretrain --data {shards} --batch 2 --length 8 {sizes} --out {tmp_path / 'run'}"
    assert main(f"{command} --steps 3".split()) == 0
    assert f"3 updates, a stream ({shards})" in capsys.readouterr().err
    assert main(f"pretrain --resume --out {tmp_path / 'run'} --steps 5".split()) == 0
    assert "is a stream and cannot go on where it stopped" in capsys.readouterr().err
    assert main(["video", str(tmp_path / "run")]) == 1
    assert "learnt from a stream, which has nothing to show; name videos with --data" in capsys.readouterr().err
    assert main(f"video {tmp_path / 'run'} --data {tmp_path / 'store'}".split()) == 0


def test_memory_does_not_grow_with_the_stream(tmp_path: Path) -> None:
    """A process of its own, since memory that is freed is not always given back."""
    shards = shards_of(tmp_path, [100] * 50, chunk_frames=50, shard_bytes=10 * 2**20)
    program = f"""
import json, resource, numpy as np
from pathlib import Path
from apv_fast.data.shards import VideoStream
stream = VideoStream(Path({str(shards)!r}), chunk_length=25, buffer_bytes=4 * 2**20)
out = np.zeros((25, 64, 64, 3), np.uint8)
peaks = []
for count in (1, 300):
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    for _ in range(count): stream.read_into(out)
peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(json.dumps(peaks))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, _, last = json.loads(result.stdout)
    assert last - before < 25, "MiB; the shards have 59"

"""Converting videos to a store: everything that can be read, nothing twice, whatever happens on the way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from apv_fast.cli import main
from apv_fast.commands.ingest import SKIPPED, ingest
from apv_fast.config import ConfigError, IngestConfig
from apv_fast.data import DiskError, StoreError, VideoStore, write_episode
from apv_fast.data.parallel_decoding import Decoded, Piece, decode, decode_all
from apv_fast.data.sources import ClipOptions, SourceError, open_source
from apv_fast.data.store_format import INDEX_FILE, shard_file
from tests.support.played import Played
from tests.support.samples import make_episode, small_files
from tests.support.source_files import write_hdf5, write_lerobot
from tests.support.video_files import numbers, plain, write_video

COUNT = 60  # videos in the large folder


def content(store: Path) -> dict[str, Any]:
    """Everything in a store, by the names of its episodes, and what was skipped."""
    opened = VideoStore(store)
    assert all(good for _, good in opened.verify())
    episodes: dict[str, Any] = {}
    for index, one in enumerate(opened):
        episodes[one.name] = (one.fps, one.camera, one.quality, one.source, opened.read(index).tobytes())
    assert list(episodes) == sorted(episodes)
    return {"episodes": episodes, "skipped": sorted((store / SKIPPED).read_text().splitlines())}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small videos, some of them damaged."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(COUNT):
        path = write_video(folder / f"{number:02d}.avi", plain(10 + number % 5, 64, 64, first=number))
        if number % 10 == 3:
            path.write_bytes(path.read_bytes()[:1000])
    return folder


@pytest.fixture(scope="module")
def undisturbed(many: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of it."""
    return ingest(IngestConfig((many,), tmp_path_factory.mktemp("undisturbed") / "store", workers=2, max_frames=9))


# One source


def decoded(path: Path, *, min_frames: int = 2, **options: Any) -> Decoded:
    chosen = ClipOptions(**options)
    (source,) = open_source(path, chosen)
    result = decode(source, path.with_name("scratch"), chosen, min_frames)
    assert result.stamp == source.stamp()
    return result


def test_decoding_to_a_scratch_file(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", plain(11))
    result = decoded(path, max_frames=5)
    assert result.pieces == [
        Piece(f"clip.mp4#{n:05d}", 5, 10.0, None, None, None) for n in range(2)
    ]  # 1 frame is too short
    frames = np.fromfile(result.scratch, np.uint8)[: 10 * 64 * 64 * 3].reshape(10, 64, 64, 3)
    assert numbers(list(frames)) == [*range(10)] and not result.problem
    assert [piece.frames for piece in decoded(path, max_frames=5, min_frames=1).pieces] == [5, 5, 1]


def test_a_short_clip_leaves_no_gap(tmp_path: Path) -> None:
    """Between others, as in a LeRobot file with a failed episode."""
    source = Played("x", tmp_path, ((0, 5), (5, 1), (6, 4)))
    result = decode(source, tmp_path / "scratch", ClipOptions(), 2)
    assert [piece.frames for piece in result.pieces] == [5, 4]
    frames = np.fromfile(result.scratch, np.uint8).reshape(-1, 64, 64, 3)
    assert numbers(list(frames)) == [0, 1, 2, 3, 4, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda path: path.write_bytes(b""), "video: cannot be opened (Invalid data found when processing input)"),
        (lambda path: write_video(path, plain(1)), "too short: 1 frames, where 2 are needed"),
    ],
)
def test_what_cannot_be_read_is_a_result(tmp_path: Path, make: Any, problem: str) -> None:
    make(tmp_path / "clip.mp4")
    result = decoded(tmp_path / "clip.mp4")
    assert (result.problem, result.pieces) == (problem, [])


def test_errors_of_every_kind_are_results(tmp_path: Path) -> None:
    for error in (RuntimeError("no"), OSError("no"), MemoryError(), KeyError("no"), SourceError(tmp_path, "x", "no")):
        source = Played("x", tmp_path, ((0, 5), (5, 9)), error)
        result = decode(source, tmp_path / "scratch", ClipOptions(), 2)
        assert [piece.frames for piece in result.pieces] == [5]  # what came before is whole
        assert result.problem == ("x: no" if isinstance(error, SourceError) else f"{type(error).__name__}: {error}")
    gone = Played("x", tmp_path / "gone", ())
    assert decode(gone, tmp_path / "scratch", ClipOptions(), 2).problem.startswith("FileNotFoundError: ")
    assert decode(Played("x", tmp_path, ()), tmp_path / "scratch", ClipOptions(), 2).problem == "has no videos"


def test_full_disk_is_no_fault_of_the_source(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", plain(11))
    with small_files(50_000), pytest.raises(DiskError, match=r"scratch .*File too large"):
        decoded(path)


# Many processes


def test_a_source_that_kills_its_process(tmp_path: Path) -> None:
    sources = [Played(f"{number}", tmp_path, ((number, 4),)) for number in range(8)]
    sources[2] = Played("2", tmp_path, ((0, 4),), signal.SIGKILL)
    sources[5] = Played("5", tmp_path, ((0, 3), (0, 4)), signal.SIGSEGV)
    results = dict(
        (source.name, result)
        for source, result in decode_all(
            sources, ClipOptions(), min_frames=2, workers=2, scratch=tmp_path, stopped=lambda: False
        )
    )
    assert sorted(results) == [str(number) for number in range(8)]
    for name, result in results.items():
        if name in ("2", "5"):
            assert (result.problem, result.pieces) == ("its reader crashed", []) and result.stamp
        else:
            frames = np.fromfile(result.scratch, np.uint8).reshape(-1, 64, 64, 3)
            assert numbers(list(frames)) == [*range(int(name), int(name) + 4)] and not result.problem


def test_everything_readable_is_in_the_store(many: Path, undisturbed: Path) -> None:
    options = ClipOptions(max_frames=9)
    out = content(undisturbed)
    expected = {}
    for source in open_source(many, options):
        if int(source.path.stem) % 10 == 3:
            continue
        for clip in source.clips(options):
            frames = list(clip.frames)
            if len(frames) > 1:
                expected[clip.name] = np.stack(frames).tobytes()
    assert {name: one[4] for name, one in out["episodes"].items()} == expected
    skipped = [json.loads(line) for line in out["skipped"]]
    assert [one["name"] for one in skipped] == [f"{many.name}/{number:02d}.avi" for number in range(3, COUNT, 10)]
    assert all(one["reason"] == skipped[0]["reason"] and "video: " in one["reason"] for one in skipped)
    assert {file.name for file in undisturbed.iterdir()} >= {INDEX_FILE, SKIPPED, "store.json", shard_file(0)}
    assert not (undisturbed / "unfinished").exists()


def test_card(many: Path, undisturbed: Path) -> None:
    text = (undisturbed / "README.md").read_text()
    episodes = len(VideoStore(undisturbed))
    assert f"| episodes | {episodes}, of 2 to 9 frames |" in text and f"- {many.name}: {episodes} episodes" in text
    assert f"apv-fast ingest {many} --out {undisturbed} --max-frames 9\n" in text
    assert f"| skipped sources | {COUNT // 10}, see skipped.jsonl |" in text
    with Image.open(undisturbed / "contact_sheet.png") as sheet:
        assert sheet.width > 8 * 64


@pytest.mark.thorough
def test_stopped_and_killed_and_gone_on(many: Path, undisturbed: Path, tmp_path: Path) -> None:
    """First Ctrl-C, then SIGKILL, then to the end with another number of processes: the store is the same."""
    out = tmp_path / "store"
    command = [sys.executable, "-m", "apv_fast.cli", "ingest", str(many), "--out", str(out), "--max-frames", "9"]
    there = 0
    for number in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen([*command, "--workers", "1"], stderr=subprocess.PIPE, text=True)
        while lines(out) < there + 8 and process.poll() is None:
            time.sleep(0.001)
        family = descendants(process.pid)
        assert len(family) > 1
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        if number == signal.SIGINT:
            assert process.returncode == 130 and "the same command goes on" in errors, errors
            assert not (out / "unfinished").exists()
        deadline = time.monotonic() + 20
        while any(map(alive, family)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not any(map(alive, family))  # nobody is left behind, even by a killed command
        assert there < lines(out) < lines(undisturbed)
        there = len(content(out)["episodes"])
    ingest(IngestConfig((many,), out, workers=2, max_frames=9))
    assert content(out) == content(undisturbed)


def descendants(process: int) -> list[int]:
    """Its children, their children, and so on."""
    children = map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split())
    return [one for child in children for one in (child, *descendants(child))]


def lines(store: Path) -> int:
    """Episodes in the index."""
    index = store / INDEX_FILE
    return index.read_bytes().count(b"\n") if index.exists() else 0


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


# Going on


def test_adding_and_changing_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos, out = tmp_path / "videos", tmp_path / "store"
    write_video(videos / "a.mp4", plain(5))
    (videos / "b.mp4").write_bytes(b"no video")
    write_episode(videos / "runs/train_episodes", make_episode(6))
    config = IngestConfig((videos,), out, workers=1)
    assert ingest(config) == out
    assert [one.name[:13] for one in VideoStore(out)] == ["videos/a.mp4", "videos/runs/t"]
    before = (out / INDEX_FILE).read_bytes(), (out / SKIPPED).read_bytes()
    capsys.readouterr()

    ingest(config)  # nothing to do, and no process is started
    assert "3 sources, 3 of them done before" in capsys.readouterr().err
    assert before == ((out / INDEX_FILE).read_bytes(), (out / SKIPPED).read_bytes())

    write_video(videos / "b.mp4", plain(4))  # mended
    write_video(videos / "c.mp4", plain(3))  # new
    write_video(videos / "a.mp4", plain(9))  # changed: not silently mixed
    ingest(config)
    assert [(one.name[:12], one.frames) for one in VideoStore(out)] == [
        ("videos/a.mp4", 5),
        ("videos/b.mp4", 4),
        ("videos/c.mp4", 3),
        ("videos/runs/", 7),
    ]
    (skipped,) = map(json.loads, (out / SKIPPED).read_text().splitlines())
    assert skipped["name"] == "videos/a.mp4" and "has changed since it was ingested" in skipped["reason"]
    assert "1 sources skipped" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["hdf5", "lerobot"])
def test_another_camera_is_another_video_of_the_episode(kind: str, tmp_path: Path) -> None:
    """Also where the first try named none."""
    cameras, out = ("agentview_image", "wrist_image"), tmp_path / "store"
    (tmp_path / "robot").mkdir()
    if kind == "hdf5":
        path = write_hdf5(tmp_path / "robot" / "lift.hdf5", ("agentview", "wrist"), 2)
    else:
        path = write_lerobot(tmp_path / "robot" / "lift", [3, 4], cameras=cameras)
    with pytest.raises(SourceError, match=r"choose one of several with apv-fast ingest --camera"):
        ingest(IngestConfig((path,), out, workers=1))
    for camera in cameras:
        ingest(IngestConfig((path,), out, workers=1, camera=camera))
    store = VideoStore(out)
    views = {episode.name: (episode.source["episode"], episode.camera) for episode in store}
    assert len(views) == len(set(views.values())) == 4
    assert len({episode for episode, _ in views.values()}) == 2


def test_torn_list_of_skipped_sources(tmp_path: Path) -> None:
    out = ingest(IngestConfig((write_episode(tmp_path, make_episode(6)),), tmp_path / "store", workers=1))
    (out / SKIPPED).write_text('{"name": "a", "path": "", "reason": "", "stamp": {}}\n{"name": "b')
    ingest(IngestConfig((next(tmp_path.glob("*.npz")),), out))
    assert (out / SKIPPED).read_text().count("\n") == 1 and '"b' not in (out / SKIPPED).read_text()


# Refusals


def test_nothing_usable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(7):
        (tmp_path / f"{number}.mp4").write_bytes(b"")
    assert main(["ingest", str(tmp_path), "--out", str(tmp_path / "store"), "--workers", "1"]) == 1
    error = capsys.readouterr().err
    assert "nothing could be read" in error and "0.mp4: video: cannot be opened" in error and "and 2 more" in error
    assert main(["ingest", str(tmp_path / "gone"), "--out", str(tmp_path / "store")]) == 1
    assert "gone: path: does not exist" in capsys.readouterr().err
    assert main(["ingest", "--out", str(tmp_path / "store")]) == 1
    assert "sources: give at least one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"size": 0}, "size is 0; it must be at least 1"),
        ({"workers": -1}, "workers is -1; it must be at least 0"),
        ({"min_frames": 0}, "min_frames is 0"),
        ({"fps": 0.0}, r"fps is 0.0; it must be positive"),
        ({"fps": float("nan")}, "fps is nan; it must be positive"),
        ({"max_frames": 1}, "max_frames is 1; it must be at least min_frames = 2"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        ingest(IngestConfig((tmp_path,), tmp_path / "store", **settings))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"fps": 5.0}, "fps: is None in the store and 5.0 now; choose another folder"),
        ({"aspect": "pad"}, "aspect: is 'crop' in the store and 'pad' now"),
        ({"size": 32}, "height: is 64 in the store and 32 now"),
    ],
)
def test_other_settings_than_the_store_has(many: Path, undisturbed: Path, settings: Any, problem: str) -> None:
    with pytest.raises(StoreError, match=problem):
        ingest(IngestConfig((many,), undisturbed, **{"max_frames": 9, **settings}))


def test_two_sources_of_one_name(tmp_path: Path) -> None:
    first, second = (write_video(tmp_path / folder / "a.mp4", plain(2)) for folder in "xy")
    with pytest.raises(ConfigError, match=r"x/a.mp4 and .*y/a.mp4 would both be called a.mp4; give the folder above"):
        ingest(IngestConfig((first, second), tmp_path / "store"))


def test_verify_finds_a_flipped_byte(many: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = undisturbed / shard_file(0)
    command = ["ingest", str(many), "--out", str(undisturbed), "--max-frames", "9", "--verify"]
    assert main(command) == 0
    assert "0 damaged" in capsys.readouterr().err
    with shard.open("r+b") as file:
        file.seek(100_000)
        byte = file.read(1)[0]
        file.seek(100_000)
        file.write(bytes([byte ^ 4]))
    try:
        assert main(command) == 1
        assert "checksums: 1 episodes have changed on the disk: " in capsys.readouterr().err
    finally:
        with shard.open("r+b") as file:
            file.seek(100_000)
            file.write(bytes([byte]))

"""Readers of data sets: npz, LeRobot and HDF5, good and damaged."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from apv_fast.data import EpisodeError, write_episode
from apv_fast.data.sources import ClipOptions, SourceError, open_source
from tests.support.samples import make_episode
from tests.support.source_files import first_clip, first_clip_of, read, write_hdf5, write_lerobot
from tests.support.video_files import numbers, plain, write_video

# npz


def test_official_episodes(tmp_path: Path) -> None:
    files = [write_episode(tmp_path / "train_episodes", make_episode(9, seed=seed)) for seed in range(2)]
    files.append(write_episode(tmp_path / "train_episodes", make_episode(4, video_only=True)))
    (tmp_path / "dataset.json").write_text(json.dumps({"world": {"quality": "fast"}, "views": ["corner"]}))
    frames = read(tmp_path)
    episodes = [frames[f"{tmp_path.name}/train_episodes/{file.name}"] for file in files]
    assert [len(one) for one in episodes] == [10, 10, 5] and len(frames) == 3
    np.testing.assert_array_equal(episodes[0], make_episode(9)["image"])
    clip = first_clip(files[0])
    assert (clip.camera, clip.quality, clip.fps) == (None, "fast", None)  # the name is not one that collect gives
    (tmp_path / "dataset.json").write_text("[]")
    assert first_clip(files[0]).quality is None


def test_any_npz_with_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", image=np.stack(plain(7, 81, 143)), other=np.zeros(3))
    assert numbers(read(tmp_path / "mine.npz")["mine.npz"]) == [*range(7)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(b"no archive" * 50),
        lambda path: np.savez(path, video=np.zeros((3, 8, 8, 3), np.uint8)),
        lambda path: np.savez(path, image=np.zeros((3, 8, 8, 3), np.float32)),
        lambda path: np.savez(path, image=np.zeros((3, 8, 8, 1), np.uint8)),
        lambda path: np.savez(path, image=np.array([{}], dtype=object)),
    ],
)
@pytest.mark.parametrize("official", [True, False])
def test_damaged_npz(tmp_path: Path, damage: Callable[[Path], object], official: bool) -> None:
    path = write_episode(tmp_path, make_episode(9))
    path = path if official else path.rename(tmp_path / "mine.npz")
    damage(path)
    with pytest.raises(EpisodeError, match=path.name):
        read(path)


# LeRobot


@pytest.mark.parametrize("pictures", [False, True])
def test_lerobot(tmp_path: Path, pictures: bool) -> None:
    root = write_lerobot(tmp_path / "robot", [5, 1, 8, 6], pictures=pictures)
    frames = read(tmp_path)  # a dataset below the folder that was given
    camera = f"{tmp_path.name}/robot/observation.images.top"
    assert list(frames) == [f"{camera}/episode_{index:06d}" for index in range(4)]
    for index, (images, length) in enumerate(zip(frames.values(), (5, 1, 8, 6), strict=True)):
        assert numbers(images) == [*range(3 * index, 3 * index + length)]
    clip = first_clip_of(open_source(root, ClipOptions())[0])
    assert (clip.fps, clip.camera) == (10, "observation.images.top")
    assert [numbers(one) for one in read(root, fps=5).values()][2] == [6, 8, 10, 12]
    assert [len(one) for one in read(root, max_frames=4).values()] == [4, 1, 1, 4, 4, 4, 2]


def test_lerobot_camera_by_name(tmp_path: Path) -> None:
    cameras = ("observation.images.top", "observation.images.wrist")
    root = write_lerobot(tmp_path / "robot", [3, 3], cameras=cameras)
    for name in ("wrist", "observation.images.wrist"):
        assert list(read(root, camera=name)) == [f"robot/{cameras[1]}/episode_{index:06d}" for index in range(2)]
    there = "the cameras are: observation.images.top, observation.images.wrist"
    with pytest.raises(SourceError, match=f"choose one of several with apv-fast ingest --camera; {there}"):
        read(root)
    with pytest.raises(SourceError, match=f"'side' is not one of those; {there}"):
        read(root, camera="side")


def test_lerobot_damage(tmp_path: Path) -> None:
    root = write_lerobot(tmp_path / "robot", [5, 4, 8, 6])
    videos = sorted(root.rglob("*.mp4"))
    write_video(videos[0], plain(8))  # one frame short: still that episode
    assert len(read(root)) == 4
    write_video(videos[0], plain(7))
    first, second = open_source(root, ClipOptions())
    whole = []
    with pytest.raises(SourceError, match="episode 1: has 2 frames in the video and 4 in meta/episodes"):
        for clip in first.clips(ClipOptions()):
            whole.append(numbers(list(clip.frames)))
    assert whole == [[0, 1, 2, 3, 4]]
    videos[1].write_bytes(b"")
    with pytest.raises(SourceError, match="cannot be opened"):
        first_clip_of(second)
    videos[1].unlink()
    with pytest.raises(SourceError, match="cannot be opened"):
        first_clip_of(second)
    table = next((root / "meta/episodes").rglob("*.parquet"))
    table.write_bytes(table.read_bytes()[:100])
    with pytest.raises(SourceError, match="table: cannot be read"):
        read(root)
    table.unlink()
    with pytest.raises(SourceError, match="there are none"):
        read(root)
    info = root / "meta/info.json"
    for content, problem in (
        ('{"codebase_version": "v2.1", "fps": 10, "features": {}}', "must be v3, not v2.1; convert it with lerobot"),
        ('{"codebase_version": "v3.0", "fps": 10, "features": {}}', "there is no video"),
        ("{}", "is not that of a LeRobot dataset"),
        ("", "is not that of a LeRobot dataset"),
    ):
        info.write_text(content)
        with pytest.raises(SourceError, match=problem):
            read(root)


# HDF5


def test_hdf5(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "lift.hdf5")
    frames = read(path)
    assert list(frames) == [f"lift.hdf5/demo_{demo}" for demo in range(11)]
    for demo, images in enumerate(frames.values()):
        assert numbers(images) == [*range(demo, 2 * demo + 3)]
    assert (first_clip(path).fps, first_clip(path).camera) == (20, "agentview")
    assert numbers(read(path, fps=10)["lift.hdf5/demo_2"]) == [2, 4, 6]


def test_hdf5_camera_and_damage(tmp_path: Path) -> None:
    import h5py

    path = write_hdf5(tmp_path / "lift.hdf5", ("agentview", "wrist"), 2)
    assert len(read(path, camera="wrist")) == len(read(path, camera="wrist_image")) == 2
    with pytest.raises(
        SourceError, match="choose one of several with apv-fast ingest --camera; the cameras are: agentview, wrist"
    ):
        read(path)
    with pytest.raises(SourceError, match="'top' is not one of those"):
        read(path, camera="top")
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"no table" * 99):
        path.write_bytes(content)
        with pytest.raises(OSError):
            read(path)
    with h5py.File(path, "w") as file:
        file["weights"] = np.zeros(3)
    with pytest.raises(SourceError, match="data: is missing"):
        read(path)


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, root = write_hdf5(tmp_path / "lift.hdf5"), write_lerobot(tmp_path / "robot", [2, 2])
    for module in ("h5py", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'apv-fast\[hdf5\]'"):
        open_source(path, ClipOptions())
    with pytest.raises(ImportError, match=r"pip install 'apv-fast\[lerobot\]'"):
        open_source(root, ClipOptions())

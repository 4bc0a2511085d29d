"""Readers of videos: the right frames in the right place, and a clear word about what cannot be read."""

from __future__ import annotations

import builtins
import itertools
import json
import os
import pickle
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from apv_fast.data import EpisodeError, write_episode
from apv_fast.data.sources import Clip, ClipOptions, Source, SourceError, open_source
from apv_fast.data.sources.clip import Fit, resample
from apv_fast.data.sources.images import natural_order
from tests.samples import make_episode
from tests.video_files import CODECS, corners, numbers, plain, turn, write_video

DATA = Path(__file__).parent / "data"


def read(path: Path, **options: Any) -> dict[str, list[np.ndarray]]:
    """The frames of every clip in ``path``."""
    chosen = ClipOptions(**options)
    found: dict[str, list[np.ndarray]] = {}
    for source in open_source(path, chosen):
        for clip in pickle.loads(pickle.dumps(source)).clips(chosen):
            assert clip.name not in found
            found[clip.name] = list(clip.frames)
            for frame in found[clip.name]:
                assert frame.dtype == np.uint8 and frame.shape == (chosen.size, chosen.size, 3)
    return found


def first_clip(path: Path, **options: Any) -> Clip:
    """Without its frames."""
    (source,) = open_source(path, ClipOptions(**options))
    return next(source.clips(ClipOptions(**options)))


def quarters(frame: np.ndarray) -> list[str]:
    """Colours of the four corners of a picture made by ``corners``, row by row."""
    names = {"100": "red", "010": "green", "001": "blue", "111": "white", "000": "black"}
    low, high = len(frame) // 4, 3 * len(frame) // 4
    picked = [frame[y, x] for y in (low, high) for x in (low, high)]
    assert all(value < 60 or value > 195 for pixel in picked for value in pixel)
    return [names["".join(str(int(value > 128)) for value in pixel)] for pixel in picked]


# Sizes and rates


@pytest.mark.parametrize(("width", "height"), [(96, 64), (64, 96), (97, 33), (33, 97), (64, 64), (7, 5), (640, 16)])
def test_every_way_to_make_a_picture_square(width: int, height: int) -> None:
    crop = Fit.of(width, height, ClipOptions(size=32))
    pad = Fit.of(width, height, ClipOptions(size=32, aspect="pad"))
    assert min(crop.width, crop.height) == 32 and max(pad.width, pad.height) == 32
    assert Fit.of(width, height, ClipOptions(size=32, aspect="stretch")) == Fit(32, 32, 32)
    coordinates = np.stack(np.broadcast_arrays(*np.ogrid[: crop.height, : crop.width], 0), -1).astype(np.uint8)
    middle = crop.place(coordinates)
    assert middle.shape == (32, 32, 3)
    assert (middle[0, 0, :2] == [(crop.height - 32) // 2 % 256, (crop.width - 32) // 2 % 256]).all()
    framed = pad.place(np.full((pad.height, pad.width, 3), 9, np.uint8))
    assert framed.shape == (32, 32, 3) and (framed == 9).sum() == 3 * pad.width * pad.height
    rows, columns = np.nonzero(framed[..., 0])
    for where in (rows, columns):
        assert abs(where.min() - (31 - where.max())) <= 1  # centred


def test_resampling_shows_what_was_on_the_screen() -> None:
    def at(times: list[float], fps: float, last: float = 0.1) -> list[int]:
        return list(resample(((time, number) for number, time in enumerate(times)), fps, last))

    tenths = [number / 10 for number in range(10)]
    assert at(tenths, 10) == [*range(10)]
    assert at(tenths, 5) == [0, 2, 4, 6, 8]
    assert at(tenths, 20) == [number // 2 for number in range(20)]
    assert at([time + 7 for time in tenths], 4) == [0, 2, 5, 7]
    assert at([0, 0.1, 0.5, 0.6], 10) == [0, 1, 1, 1, 1, 2, 3]  # a pause
    assert at([0], 10) == [0] and at([], 10) == []
    with pytest.raises(SourceError, match="jumps from 0 to 1000000 s"):
        at([0, 1e6], 10)


def test_natural_order() -> None:
    assert natural_order(["b10", "b9", "a", "b9c", "10", "9", "b09"]) == ["9", "10", "a", "b09", "b9", "b9c", "b10"]


# Video files


@pytest.mark.parametrize("suffix", CODECS)
@pytest.mark.parametrize(("width", "height"), [(96, 80), (81, 143), (64, 64), (16, 16)])
def test_good_video(tmp_path: Path, suffix: str, width: int, height: int) -> None:
    if suffix in (".avi", ".webm"):
        width, height = width // 2 * 2, height // 2 * 2  # what these encoders take
    path = write_video(tmp_path / f"clip{suffix}", plain(12, width, height))
    frames = read(path)
    assert list(frames) == [f"clip{suffix}"]
    assert numbers(frames[f"clip{suffix}"]) == [*range(12)]
    assert first_clip(path).fps == 10 and first_clip(path, fps=5).fps == 5
    assert numbers(read(path, fps=5)[path.name]) == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize(
    ("suffix", "codec"), [(".mp4", "libsvtav1"), (".mp4", "libx265"), (".webm", "libvpx-vp9"), (".mkv", "ffv1")]
)
def test_other_codecs(tmp_path: Path, suffix: str, codec: str) -> None:
    """AV1 is what LeRobot writes, HEVC what phones do."""
    path = write_video(tmp_path / f"clip{suffix}", plain(6), codec=codec)
    assert numbers(read(path)[path.name]) == [*range(6)]


@pytest.mark.parametrize("suffix", CODECS)
def test_one_frame(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"clip{suffix}", plain(1, first=5))
    assert numbers(read(path)[path.name]) == [5]


@pytest.mark.parametrize("suffix", CODECS)
@pytest.mark.parametrize("part", [0.3, 0.6, 0.85])
def test_truncated_video(tmp_path: Path, suffix: str, part: float) -> None:
    whole = write_video(tmp_path / f"clip{suffix}", plain(24)).read_bytes()
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(whole[: int(len(whole) * part)])
    problems = "cannot be opened|breaks off|has no frames|there is none|frame . is damaged"
    with pytest.raises(SourceError, match=rf"cut{suffix}: video: ({problems})"):
        read(path)


def test_truncated_after_its_header(tmp_path: Path) -> None:
    """An MP4 whose index comes first opens well; whole pieces that come before the damage are read."""
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 255, (64, 64, 3), dtype=np.uint8) for _ in range(30)]
    path = write_video(tmp_path / "clip.mp4", noise, options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(SourceError, match="breaks off after"):
        read(path)
    pieces = []
    with pytest.raises(SourceError, match="breaks off after"):
        for clip in open_source(path, ClipOptions())[0].clips(ClipOptions(max_frames=6)):
            pieces.append(len(list(clip.frames)))
    assert pieces and pieces == [6] * len(pieces)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "cannot be opened"),
        (b"This is no video.\n" * 100, "cannot be opened"),
        (b"\0" * 5000, "cannot be opened"),
        (bytes(range(256)) * 40, "cannot be opened"),
    ],
)
@pytest.mark.parametrize("suffix", CODECS)
def test_not_a_video(tmp_path: Path, suffix: str, content: bytes, problem: str) -> None:
    path = tmp_path / f"clip{suffix}"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=problem):
        read(path)


def test_titles_that_are_not_utf8(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", plain(3))
    content = path.read_bytes()
    assert b"VideoHandler" in content
    path.write_bytes(content.replace(b"VideoHandler", b"Vid\xe9oHandler"))
    assert numbers(read(path)[path.name]) == [0, 1, 2]


def test_unknown_codec_and_sound_only(tmp_path: Path) -> None:
    import av

    path = write_video(tmp_path / "clip.mp4", plain(12))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzz1"))
    with pytest.raises(SourceError, match="is in a code that this FFmpeg does not know"):
        read(path)
    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        assert isinstance(stream, av.AudioStream)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(SourceError, match="there is none in the file"):
        read(sound)


@pytest.mark.parametrize(
    ("quarter", "expected"),
    [
        (0, ["red", "green", "blue", "white"]),
        (1, ["blue", "red", "white", "green"]),
        (2, ["white", "blue", "green", "red"]),
        (3, ["green", "white", "red", "blue"]),
    ],
)
def test_rotation_is_honoured(tmp_path: Path, quarter: int, expected: list[str]) -> None:
    path = write_video(tmp_path / "clip.mp4", [corners(128, 64)] * 2)
    if quarter:
        turn(path, quarter)
    assert quarters(read(path)[path.name][0]) == expected
    padded = read(path, aspect="pad")[path.name][0]
    assert quarters(np.rot90(padded, quarter)[16:48].repeat(2, 0)) == ["red", "green", "blue", "white"]
    assert not np.rot90(padded, quarter)[:15].any()


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    """A disc stored half as wide as it is shown."""
    y, x = np.mgrid[:64, :64]
    disc = (((x - 32) * 2) ** 2 + (y - 32) ** 2 < 30**2).astype(np.uint8) * 255
    path = write_video(tmp_path / "clip.mp4", [np.repeat(disc[..., None], 3, 2)] * 2, pixel_aspect=Fraction(2, 1))
    frame = read(path)[path.name][0][..., 0] > 128
    assert abs(frame[32].sum() - 60) <= 3 and abs(frame[:, 32].sum() - 60) <= 3


def test_variable_frame_rate(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mkv", plain(6), times=[0, 1, 2, 6, 7, 9])
    assert numbers(read(path)[path.name]) == [*range(6)]
    assert numbers(read(path, fps=10)[path.name])[:10] == [0, 1, 2, 2, 2, 2, 3, 4, 4, 5]


def test_long_videos_are_cut(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", plain(23))
    frames = read(path, max_frames=10)
    assert list(frames) == ["clip.mp4#00000", "clip.mp4#00001", "clip.mp4#00002"]
    assert [number for part in frames.values() for number in numbers(part)] == [*range(23)]
    assert [len(part) for part in frames.values()] == [10, 10, 3]
    assert [len(part) for part in read(path, max_frames=23).values()] == [23]


def test_shrinking_is_the_mean_over_areas(tmp_path: Path) -> None:
    """Fine stripes become grey, not stripes of another width; measured against the exact mean."""
    rng = np.random.default_rng(0)
    image = np.repeat(rng.integers(30, 220, (320, 320, 1), dtype=np.uint8), 3, 2)
    path = write_video(tmp_path / "clip.mkv", [image] * 2)
    frame = read(path)[path.name][1].astype(float)
    exact = image.reshape(64, 5, 64, 5, 3).mean((1, 3))
    assert np.abs(frame - exact).mean() < 3


def test_real_clip() -> None:
    """Big Buck Bunny, see tests/data/README.md."""
    frames = read(DATA / "big_buck_bunny.mp4")["big_buck_bunny.mp4"]
    assert len(frames) == 50
    stack = np.stack(frames).astype(float)
    assert 40 < stack.mean() < 200 and stack.std() > 20
    assert np.abs(np.diff(stack, axis=0)).mean() < 10  # it moves, and does not jump
    assert np.abs(np.diff(stack, axis=0)).mean() > 0.2


# Folders of frames


def write_frames(folder: Path, frames: list[np.ndarray], suffix: str = ".png") -> Path:
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{number}{suffix}")
    return folder


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".bmp", ".webp"])
@pytest.mark.parametrize(("width", "height"), [(96, 80), (81, 143), (64, 64), (5, 3)])
def test_folder_of_frames(tmp_path: Path, suffix: str, width: int, height: int) -> None:
    folder = write_frames(tmp_path / "walk", plain(12, width, height), suffix)
    (folder / "notes.txt").write_text("no frame")
    frames = read(folder)
    assert list(frames) == ["walk"] and numbers(frames["walk"]) == [*range(12)]
    pieces = read(folder, max_frames=5)
    assert [len(piece) for piece in pieces.values()] == [5, 5, 2]


def test_frames_of_the_right_size_are_not_touched(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 255, (64, 64, 3), dtype=np.uint8) for _ in range(3)]
    np.testing.assert_array_equal(read(write_frames(tmp_path / "a", noise))["a"], noise)
    large = [frame.repeat(3, 0).repeat(3, 1) for frame in noise]
    np.testing.assert_array_equal(read(write_frames(tmp_path / "b", large))["b"], noise)  # the exact mean


def test_upright_photographs_and_other_modes(tmp_path: Path) -> None:
    image = Image.fromarray(corners(96, 64))
    exif = image.getexif()
    exif[0x0112] = 6  # turn clockwise to show
    (tmp_path / "photos").mkdir()
    for name in ("1.jpg", "2.jpg"):
        image.save(tmp_path / "photos" / name, exif=exif, quality=95)
    assert quarters(read(tmp_path / "photos")["photos"][0]) == ["blue", "red", "white", "green"]
    (tmp_path / "modes").mkdir()
    for number, mode in enumerate(("P", "L", "RGBA", "1")):
        Image.fromarray(plain(1, first=20)[0]).convert(mode).save(tmp_path / "modes" / f"{number}.png")
    assert numbers(read(tmp_path / "modes")["modes"][:3]) == [20, 20, 20]
    Image.fromarray(np.full((64, 64), 40000, np.uint16)).save(tmp_path / "modes" / "9.png")
    with pytest.raises(SourceError, match=r"9.png: pixels: must have 8 bits a channel, not mode I"):
        read(tmp_path / "modes")


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_damaged_frame(tmp_path: Path, content: bytes | None) -> None:
    folder = write_frames(tmp_path / "walk", plain(4))
    whole = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(SourceError, match=r"2.png: picture: cannot be read"):
        read(folder)


def test_pictures_that_are_not_one_video(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "album", [*plain(2), *plain(1, 100, 50)])
    with pytest.raises(SourceError, match=r"2.png: size: is 100×50 and the first is 96×80: not one video"):
        read(folder)


# npz


def test_official_episodes(tmp_path: Path) -> None:
    files = [write_episode(tmp_path / "train_episodes", make_episode(9, seed=seed)) for seed in range(2)]
    files.append(write_episode(tmp_path / "train_episodes", make_episode(4, video_only=True)))
    world = {"world": {"camera": "corner", "quality": "fast"}}
    (tmp_path / "dataset.json").write_text(json.dumps(world))
    frames = read(tmp_path)
    found = [frames[f"{tmp_path.name}/train_episodes/{file.name}"] for file in files]
    assert [len(one) for one in found] == [10, 10, 5] and len(frames) == 3
    np.testing.assert_array_equal(found[0], make_episode(9)["image"])
    clip = first_clip(files[0])
    assert (clip.camera, clip.quality, clip.fps) == ("corner", "fast", None)
    (tmp_path / "dataset.json").write_text("[]")
    assert first_clip(files[0]).camera is None


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


def write_lerobot(
    root: Path, lengths: list[int], *, cameras: tuple[str, ...] = ("observation.images.top",), pictures: bool = False
) -> Path:
    """A dataset of two files, in v3 of the format; every episode begins with frame 3·index."""
    import io

    import pyarrow
    import pyarrow.parquet

    def save(path: Path, rows: list[dict[str, Any]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)

    def png(image: np.ndarray) -> dict[str, object]:
        Image.fromarray(image).save(packed := io.BytesIO(), "PNG")
        return {"bytes": packed.getvalue(), "path": None}

    features = {camera: {"dtype": "image" if pictures else "video", "shape": [80, 96, 3]} for camera in cameras}
    info = {
        "codebase_version": "v3.0",
        "fps": 10,
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "features": {**features, "action": {"dtype": "float32", "shape": [2]}},
    }
    (root / "meta").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    half = (len(lengths) + 1) // 2
    rows = []
    for file, indices in enumerate((range(half), range(half, len(lengths)))):
        video = [frame for index in indices for frame in plain(lengths[index], first=3 * index)]
        for camera in cameras:
            write_video(root / f"videos/{camera}/chunk-000/file-{file:03d}.mp4", video or plain(1))
        frames = [
            {"episode_index": index, "action": [0.0, 1.0]} | {camera: png(image) for camera in cameras if pictures}
            for index in indices
            for image in plain(lengths[index], first=3 * index)
        ]
        save(root / f"data/chunk-000/file-{file:03d}.parquet", frames)
        begin = 0
        for index in indices:
            row: dict[str, Any] = {"episode_index": index, "length": lengths[index], "stats/action/mean": [0.0, 0.0]}
            row |= {"data/chunk_index": 0, "data/file_index": file}
            for camera in cameras:
                row |= {f"videos/{camera}/chunk_index": 0, f"videos/{camera}/file_index": file}
                row[f"videos/{camera}/from_timestamp"] = begin / 10
                row[f"videos/{camera}/to_timestamp"] = (begin + lengths[index]) / 10
            begin += lengths[index]
            rows.append(row)
    save(root / "meta/episodes/chunk-000/file-000.parquet", rows)
    return root


@pytest.mark.parametrize("pictures", [False, True])
def test_lerobot(tmp_path: Path, pictures: bool) -> None:
    root = write_lerobot(tmp_path / "robot", [5, 1, 8, 6], pictures=pictures)
    frames = read(tmp_path)  # a dataset below the folder that was given
    camera = f"{tmp_path.name}/robot/observation.images.top"
    assert list(frames) == [f"{camera}/episode_{index:06d}" for index in range(4)]
    for index, (found, length) in enumerate(zip(frames.values(), (5, 1, 8, 6), strict=True)):
        assert numbers(found) == [*range(3 * index, 3 * index + length)]
    clip = first_clip_of(open_source(root, ClipOptions())[0])
    assert (clip.fps, clip.camera) == (10, "observation.images.top")
    assert [numbers(one) for one in read(root, fps=5).values()][2] == [6, 8, 10, 12]
    assert [len(one) for one in read(root, max_frames=4).values()] == [4, 1, 1, 4, 4, 4, 2]


def first_clip_of(source: Source) -> Clip:
    return next(source.clips(ClipOptions()))


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


def write_hdf5(path: Path, cameras: tuple[str, ...] = ("agentview",), demos: int = 11) -> Path:
    import h5py

    with h5py.File(path, "w") as file:
        file.create_group("data").attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": 20}})
        for demo in range(demos):
            for camera in cameras:
                images = np.stack(plain(3 + demo, 84, 84, first=demo))
                file[f"data/demo_{demo}/obs/{camera}_image"] = images
            file[f"data/demo_{demo}/obs/robot0_eef_pos"] = np.zeros((3 + demo, 3))
    return path


def test_hdf5(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "lift.hdf5")
    frames = read(path)
    assert list(frames) == [f"lift.hdf5/demo_{demo}" for demo in range(11)]
    for demo, found in enumerate(frames.values()):
        assert numbers(found) == [*range(demo, 2 * demo + 3)]
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
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in ("h5py", "pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'apv-fast\[hdf5\]'"):
        open_source(path, ClipOptions())
    with pytest.raises(ImportError, match=r"pip install 'apv-fast\[lerobot\]'"):
        open_source(root, ClipOptions())


# What a path holds


def test_a_folder_of_everything(tmp_path: Path) -> None:
    root = tmp_path / "videos"
    for name in ("b10.mp4", "b9.webm", "deep/er/a.GIF".lower()):
        write_video(root / name, plain(2))
    write_frames(root / "walk", plain(3))
    write_frames(root / "album", plain(1))  # one picture is no video
    Image.fromarray(plain(1)[0]).save(root / "b9-1.png")
    Image.fromarray(plain(1)[0]).save(root / "b9-2.png")  # thumbnails
    write_episode(root / "run/train_episodes", make_episode(2))
    (root / "README.md").write_text("text")
    (root / ".hidden.mp4").write_text("text")
    (root / "deep/loop").symlink_to(root)
    os.link(root / "b9.webm", root / "UPPER.WEBM")
    names = [source.name for source in open_source(root, ClipOptions())]
    assert names[:5] == ["videos/UPPER.WEBM", "videos/b9.webm", "videos/b10.mp4", "videos/deep/er/a.gif", names[4]]
    assert names[4].startswith("videos/run/train_episodes/2") and names[5:] == ["videos/walk"]
    assert [source.stamp()["bytes"] > 0 for source in open_source(root, ClipOptions())] == [True] * 6


def test_stamp_changes_with_the_source(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "walk", plain(3))
    (source,) = open_source(folder, ClipOptions())
    before = source.stamp()
    assert before == open_source(folder, ClipOptions())[0].stamp()
    os.utime(folder / "1.png", ns=(2**62, 2**62))
    assert source.stamp() != before


def test_nothing_to_read_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        open_source(tmp_path / "gone", ClipOptions())
    with pytest.raises(SourceError, match=r"files found: none; what can be read: video files \(MP4"):
        open_source(tmp_path, ClipOptions())
    for name in ("a.bag", "b.bag", "c.txt"):
        (tmp_path / name).write_text("")
    with pytest.raises(SourceError, match=r"has nothing to read; files found: 2 .bag, 1 .txt"):
        open_source(tmp_path, ClipOptions())
    with pytest.raises(SourceError, match=r"a.bag: file: .bag is not known"):
        open_source(tmp_path / "a.bag", ClipOptions())
    (tmp_path / "store.json").write_text("{}")
    with pytest.raises(SourceError, match="is a store already"):
        open_source(tmp_path, ClipOptions())


def test_frames_come_as_they_are_asked_for(tmp_path: Path) -> None:
    """A damaged end is met when it is reached, not before: nothing reads the whole video first."""
    folder = write_frames(tmp_path / "walk", plain(20))
    (folder / "15.png").write_bytes(b"")
    (source,) = open_source(folder, ClipOptions())
    clip = first_clip_of(source)
    assert numbers(list(itertools.islice(clip.frames, 15))) == [*range(15)]
    with pytest.raises(SourceError, match=r"15.png"):
        next(clip.frames)
    assert list(itertools.islice(resample(((n / 10, n) for n in itertools.count()), 5, 0.1), 3)) == [0, 2, 4]

"""Readers of video files: the right frames, of the right size, and a clear word about what cannot be read."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from apv_fast.data.sources import ClipOptions, SourceError, open_source
from apv_fast.data.sources.clip import Fit, resample
from apv_fast.data.sources.images import natural_order
from tests.support import FILES
from tests.support.source_files import first_clip, quarters, read
from tests.support.video_files import CODECS, corners, numbers, plain, turn, write_video

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
    """Big Buck Bunny, see tests/files/README.md."""
    frames = read(FILES / "big_buck_bunny.mp4")["big_buck_bunny.mp4"]
    assert len(frames) == 50
    stack = np.stack(frames).astype(float)
    assert 40 < stack.mean() < 200 and stack.std() > 20
    assert np.abs(np.diff(stack, axis=0)).mean() < 10  # it moves, and does not jump
    assert np.abs(np.diff(stack, axis=0)).mean() > 0.2

"""What a path holds, and folders of frames."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from apv_fast.data import write_episode
from apv_fast.data.sources import ClipOptions, SourceError, open_source
from apv_fast.data.sources.clip import resample
from tests.support.samples import make_episode
from tests.support.source_files import first_clip_of, quarters, read, write_frames
from tests.support.video_files import corners, numbers, plain, write_video

# Folders of frames


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
    large = [rng.integers(0, 255, (192, 192, 3), dtype=np.uint8) for _ in range(3)]
    mean = np.stack(large).reshape(3, 64, 3, 64, 3, 3).mean((2, 4))
    np.testing.assert_allclose(np.stack(read(write_frames(tmp_path / "b", large))["b"]), mean, rtol=0, atol=1)


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


def test_a_store_among_videos_is_not_left_out_silently(tmp_path: Path) -> None:
    write_video(tmp_path / "videos" / "a.mp4", plain(2))
    (tmp_path / "videos" / "robots").mkdir()
    (tmp_path / "videos" / "robots" / "store.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"left out .*videos/robots: it is a store already"):
        (source,) = open_source(tmp_path / "videos", ClipOptions())
    assert source.name == "videos/a.mp4"


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

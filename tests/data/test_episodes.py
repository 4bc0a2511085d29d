"""Episode files: the official layout, damage of every kind, a full disk, a killed writer."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apv_fast.data import EPISODE_KEYS, VIDEO_KEYS, DiskError, EpisodeError, read_episode, write_episode
from apv_fast.data.episodes import episode_length, stack_transitions
from tests.support import GOLDEN
from tests.support.samples import make_episode, rows_of, small_disk, small_files

OFFICIAL = next((GOLDEN / "official_episodes").glob("*.npz"))


def test_reads_what_the_official_code_wrote() -> None:
    episode = read_episode(OFFICIAL, image_shape=(64, 64, 3))
    assert {key: (value.dtype.name, value.shape) for key, value in episode.items()} == {
        "image": ("uint8", (7, 64, 64, 3)),
        "is_first": ("bool", (7,)),
        "is_last": ("bool", (7,)),
        "is_terminal": ("bool", (7,)),
        "action": ("float32", (7, 1)),
        "reward": ("float32", (7,)),
    }
    assert episode["is_first"].tolist() == [True] + [False] * 6


def test_writes_what_the_official_code_reads(tmp_path: Path) -> None:
    path = write_episode(tmp_path / "new", make_episode(6, actions=1))
    # The official reader: length from the name, then plain np.load without a word about pickles.
    assert int(str(path).split("-")[-1][:-4]) == 6
    with np.load(path) as ours, np.load(OFFICIAL) as official:
        assert set(ours.files) == set(official.files)
        for key in official.files:
            assert (ours[key].dtype, ours[key].shape) == (official[key].dtype, official[key].shape)
    with zipfile.ZipFile(path) as ours_zip, zipfile.ZipFile(OFFICIAL) as official_zip:
        assert {one.compress_type for one in ours_zip.infolist()} == {
            one.compress_type for one in official_zip.infolist()
        }
    form = [len(part) for part in OFFICIAL.stem.split("-")]
    assert [len(part) for part in path.stem.split("-")] == form


@settings(max_examples=15, deadline=None)
@given(length=st.integers(0, 12), actions=st.integers(1, 5), size=st.integers(1, 9), extra=st.booleans())
def test_round_trip(length: int, actions: int, size: int, extra: bool) -> None:
    episode = make_episode(length, actions=actions)
    episode["image"] = episode["image"][:, :size, : size + 1]
    if extra:
        episode["success"] = np.arange(length + 1) % 2 == 0
    with tempfile.TemporaryDirectory() as directory:
        path = write_episode(Path(directory), episode)
        assert episode_length(path) == length
        back = read_episode(path, tuple(episode))
    assert back.keys() == episode.keys()
    for key, value in episode.items():
        np.testing.assert_array_equal(back[key], value)
        assert back[key].dtype == value.dtype


def test_names_sort_in_the_order_of_writing(tmp_path: Path) -> None:
    paths = [write_episode(tmp_path, make_episode(length)) for length in (9, 1, 5, 3, 7, 2)]
    assert sorted(tmp_path.glob("*.npz")) == paths


def test_rows_stack_to_the_episode_that_they_came_from() -> None:
    episode = make_episode(4)
    for key, value in stack_transitions(rows_of(episode)).items():
        np.testing.assert_array_equal(value, episode[key])
    with pytest.raises(EpisodeError, match="is_first: must be in every row"):
        stack_transitions([*rows_of(episode), {"image": episode["image"][0]}])


def save_raw(directory: Path, length: int, episode: dict[str, np.ndarray]) -> Path:
    path = directory / f"20260101T000000-{'0' * 32}-{length}.npz"
    np.savez_compressed(path, **episode)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("image", np.zeros((7, 64, 64, 3), np.float32), r"image: must be uint8 \[7, 64, 64, 3\], not float32 \[7, 64"),
        (
            "image",
            np.zeros((7, 32, 64, 3), np.uint8),
            r"image: must be uint8 \[7, 64, 64, 3\], not uint8 \[7, 32, 64, 3\]",
        ),
        ("image", np.zeros((7, 64, 64, 1), np.uint8), "image: must be uint8"),
        ("image", np.zeros((7, 64, 64), np.uint8), "image: must be uint8"),
        ("image", np.zeros((6, 64, 64, 3), np.uint8), "image: must have 7 rows"),
        ("is_first", np.zeros(7, np.uint8), r"is_first: must be bool \[7\], not uint8 \[7\]"),
        ("is_last", np.zeros((7, 1), bool), "is_last: must have 1 dimensions"),
        ("is_terminal", np.zeros(8, bool), "is_terminal: must have 7 rows"),
        ("action", np.zeros(7, np.float32), "action: must have 2 dimensions"),
        ("action", np.zeros((5, 2), np.float32), r"action: must have 7 rows .* not float32 \[5, 2\]"),
        ("action", np.zeros((7, 2), np.int64), "action: must be floating-point"),
        ("action", np.full((7, 2), np.nan, np.float32), "action: must be finite"),
        ("reward", np.array(3.0), "reward: must have 1 dimensions"),
        ("reward", np.full(7, np.inf), "reward: must be finite"),
        ("reward", np.array(["a"] * 7), "reward: must be floating-point"),
        ("reward", np.array([{}] * 7, dtype=object), "reward: cannot be read .*allow_pickle"),
    ],
)
def test_wrong_arrays(tmp_path: Path, key: str, value: np.ndarray, message: str) -> None:
    path = save_raw(tmp_path, 6, make_episode(6) | {key: value})
    with pytest.raises(EpisodeError, match=message) as raised:
        read_episode(path, image_shape=(64, 64, 3))
    assert str(path) in str(raised.value)
    assert raised.value.field == key


@pytest.mark.parametrize("key", EPISODE_KEYS)
def test_missing_key(tmp_path: Path, key: str) -> None:
    episode = make_episode(6)
    del episode[key]
    path = save_raw(tmp_path, 6, episode)
    with pytest.raises(EpisodeError, match=f"{key}: is missing; the file has: "):
        read_episode(path)


def test_length_in_the_name_disagrees(tmp_path: Path) -> None:
    with pytest.raises(EpisodeError, match="image: must have 10 rows"):
        read_episode(save_raw(tmp_path, 9, make_episode(6)))


@pytest.mark.parametrize("name", ["episode.npz", "20260101T000000-abc-6.npz", f"20260101T000000-{'0' * 32}.npz"])
def test_a_foreign_name(tmp_path: Path, name: str) -> None:
    path = save_raw(tmp_path, 6, make_episode(6)).rename(tmp_path / name)
    with pytest.raises(EpisodeError, match="file name: must be"):
        read_episode(path)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damage_anywhere_is_an_episode_error_or_harmless(data: st.DataObject) -> None:
    """Truncated or overwritten at any place: the arrays that were written, or an EpisodeError; never anything else."""
    episode = make_episode(3)
    with tempfile.TemporaryDirectory() as directory:
        path = write_episode(Path(directory), episode)
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1), label="place")
        if data.draw(st.booleans(), label="truncate"):
            del content[place:]
        else:
            content[place : place + 20] = data.draw(st.binary(min_size=1, max_size=20), label="bytes")
        path.write_bytes(content)
        try:
            read = read_episode(path)
        except EpisodeError as error:
            assert str(path) in str(error)
        else:
            for key, value in episode.items():
                np.testing.assert_array_equal(read[key], value)


def test_a_file_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / f"20260101T000000-{'0' * 32}-6.npz"
    for content in (b"", b"text", b"PK\x05\x06" + b"\0" * 18):
        path.write_bytes(content)
        with pytest.raises(EpisodeError, match=r"archive: cannot be read|image: is missing"):
            read_episode(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(EpisodeError, match="not a zip archive"):
        read_episode(path)


def test_a_video_is_read_without_touching_its_actions(tmp_path: Path) -> None:
    path = save_raw(tmp_path, 6, make_episode(6) | {"action": np.array([{}], dtype=object)})
    assert set(read_episode(path, VIDEO_KEYS)) == set(VIDEO_KEYS)
    path = save_raw(tmp_path, 6, make_episode(6, video_only=True))
    assert set(read_episode(path, VIDEO_KEYS)) == set(VIDEO_KEYS)


def test_bad_episodes_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(EpisodeError, match="is_last: is missing"):
        write_episode(tmp_path, {"image": make_episode(3)["image"], "is_first": np.zeros(4, bool)})
    with pytest.raises(EpisodeError, match="action: must have 4 rows"):
        write_episode(tmp_path, make_episode(3) | {"action": np.zeros((3, 2), np.float32)})
    assert list(tmp_path.iterdir()) == []


def noise(length: int) -> dict[str, np.ndarray]:
    image = np.random.default_rng(0).integers(0, 256, (length + 1, 64, 64, 3), dtype=np.uint8)
    return make_episode(length) | {"image": image}  # does not compress


@pytest.mark.parametrize("how", ["file size limit", "full file system"])
def test_full_disk(tmp_path: Path, how: str) -> None:
    kept = write_episode(tmp_path, make_episode(5)) if how == "file size limit" else None
    with small_files(200_000) if how == "file size limit" else small_disk(tmp_path, "200k"):
        kept = kept or write_episode(tmp_path, make_episode(5))
        with pytest.raises(DiskError, match=f"cannot write {tmp_path}.*-50.npz") as raised:
            write_episode(tmp_path, noise(50))
        assert "MiB are free" in str(raised.value)
        assert list(tmp_path.iterdir()) == [kept]
        read_episode(kept)
        write_episode(tmp_path, make_episode(4))


WRITER = """
import sys
from pathlib import Path
from apv_fast.data import write_episode
from tests.data.test_episodes import noise
while True:
    print(write_episode(Path(sys.argv[1]), noise(20)).name, flush=True)
"""


def test_kill_9_leaves_only_complete_files(tmp_path: Path) -> None:
    for attempt in range(3):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout
            reported = [writer.stdout.readline().strip() for _ in range(3)]
            time.sleep(0.013 * attempt)
            writer.send_signal(signal.SIGKILL)
            reported += writer.stdout.read().split()
        assert all((tmp_path / name).exists() for name in reported)
    files = list(tmp_path.glob("*.npz"))
    assert len(files) >= 9
    for path in files:
        assert len(read_episode(path)["image"]) == 21

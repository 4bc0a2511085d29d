"""Folders of collected videos: order, repetition, and what a crash leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from apv_fast.data import DiskError, EpisodeError, read_episode
from apv_fast.data.collect_writers import EpisodeWriter, Journal, Mp4Writer, NpzWriter, VideoStoreWriter
from tests.support.samples import make_episode, small_files

VIEWS = ("front", "a camera/of a robot")
OUTPUTS: dict[str, Callable[[Path], EpisodeWriter]] = {
    "npz": lambda folder: NpzWriter(folder, "20261125T100000", "{}"),
    "mp4": lambda folder: Mp4Writer(folder, 20),
    "store": lambda folder: VideoStoreWriter(folder, 20, "fast", 64, {"env": "x"}),
}


def _write(output: EpisodeWriter, index: int) -> dict[str, np.ndarray]:
    """Episode ``index``, of ``index + 5`` steps; its videos."""
    rows = make_episode(index + 5, seed=index)
    image = rows.pop("image")
    videos = {view: image + np.uint8(10 * place) for place, view in enumerate(VIEWS)}
    output.write(index, videos, rows)
    return videos


@pytest.mark.parametrize("name", ["npz", "store"])
def test_every_video_is_where_it_belongs(name: str, tmp_path: Path) -> None:
    output = OUTPUTS[name](tmp_path)
    written = {index: _write(output, index) for index in (3, 1, 2)}
    output.close()
    output = OUTPUTS[name](tmp_path)
    _write(output, 1)  # of a process that was killed before it could say that this is finished
    for index, videos in written.items():
        for view, frames in videos.items():
            np.testing.assert_array_equal(output.read(index, view), frames)
    output.close()


def test_mp4_files_have_the_names_of_episode_and_view(tmp_path: Path) -> None:
    rows = make_episode(5)
    Mp4Writer(tmp_path, 20).write(7, {"front": rows.pop("image")}, rows)
    assert [path.name for path in (tmp_path / "videos").iterdir()] == ["000007-front.mp4"]


def test_episode_files_sort_by_episode_whenever_they_were_written(tmp_path: Path) -> None:
    output = OUTPUTS["npz"](tmp_path)
    for index in (20, 3, 1):
        _write(output, index)
    paths = sorted((tmp_path / "train_episodes").iterdir())
    assert [len(read_episode(path)["reward"]) for path in paths] == [7, 7, 9, 9, 26, 26]
    assert read_episode(paths[0])["reward"][1] == 1001


def test_no_two_data_sets_have_files_of_the_same_names(tmp_path: Path) -> None:
    names = set()
    for identity in ("a", "b"):
        _write(NpzWriter(tmp_path / identity, "20261125T100000", identity), 0)
        names |= {path.name for path in (tmp_path / identity / "train_episodes").iterdir()}
    assert len(names) == 4


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_full_disk_leaves_nothing_half(name: str, tmp_path: Path) -> None:
    output = OUTPUTS[name](tmp_path)
    with small_files(500), pytest.raises(DiskError):
        rows = make_episode(5)
        rows["image"][:] = np.random.default_rng(0).integers(0, 256, rows["image"].shape)
        output.write(0, {"front": rows.pop("image")}, rows)
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix in (".npz", ".mp4", ".tmp")]
    assert not left
    rows = make_episode(5)
    output.write(0, {"front": rows.pop("image")}, rows)
    assert output.read(0, "front").shape == (6, 64, 64, 3)
    output.close()


# The journal


def test_journal_knows_what_is_finished(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        assert journal.entries == {}
        journal.add(4, {"return": 1.5})
        journal.add(0, {"return": 2.5})
        with pytest.raises(EpisodeError, match="another process is writing"):
            Journal(tmp_path)
    with journal.path.open("a") as file:
        file.write('{"episode": 1, "retu')
    with Journal(tmp_path) as journal:
        assert journal.entries == {4: {"episode": 4, "return": 1.5}, 0: {"episode": 0, "return": 2.5}}
        journal.add(1, {"return": 3.5})
    with Journal(tmp_path) as journal:
        assert sorted(journal.entries) == [0, 1, 4]


@pytest.mark.parametrize("line", ["{not json}", "[1]", '{"return": 1}'])
def test_a_damaged_journal_is_an_error_that_names_the_line(line: str, tmp_path: Path) -> None:
    (tmp_path / "episodes.jsonl").write_text(f'{{"episode": 0}}\n{line}\n')
    with pytest.raises(EpisodeError, match=r"episodes.jsonl: line 2: "):
        Journal(tmp_path)
    (tmp_path / "episodes.jsonl").unlink()
    with Journal(tmp_path):
        pass


def test_journal_on_a_full_disk(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.add(0, {})
        with small_files(30), pytest.raises(DiskError, match=r"episodes.jsonl"):
            journal.add(1, {"return": 1.0, "length": 3})
        assert sorted(journal.entries) == [0]
        journal.add(2, {})
    with Journal(tmp_path) as journal:
        assert sorted(journal.entries) == [0, 2]

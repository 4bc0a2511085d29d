"""``apv-fast collect``: the same episodes in every format and with every number of processes, and their card."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from apv_fast.cli import main, parse
from apv_fast.data import read_episode
from apv_fast.data.corpus import StoreCorpus
from apv_fast.data.mp4 import read_mp4
from apv_fast.data.store import VideoStore
from apv_fast.run import interrupt, latest_checkpoint, load_checkpoint
from tests.support import ROOT
from tests.support.command_line import refused

WORLD = "--world.action-repeat 20 --world.time-limit 200 --world.quality fast"
COMMAND = f"collect --env dmc:cartpole-balance {WORLD} --seed 3"
VIEWS = "--cameras fixed,lookatcart"
EPISODES = 3


def apv(command: str) -> None:
    assert main(command.split()) == 0, command


def episodes_of(folder: Path) -> list[dict[str, np.ndarray]]:
    """All files in the order of their names."""
    return [read_episode(path) for path in sorted((folder / "train_episodes").iterdir())]


def same(one: list[dict[str, np.ndarray]], other: list[dict[str, np.ndarray]]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
        for a, b in zip(one, other, strict=True)
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three episodes from two cameras, made by one process."""
    folder = tmp_path_factory.mktemp("collect") / "data"
    apv(f"{COMMAND} {VIEWS} --episodes {EPISODES} --out {folder}")
    return folder


@pytest.fixture(scope="module")
def mp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as MP4 files."""
    folder = tmp_path_factory.mktemp("collect") / "mp4"
    apv(f"{COMMAND} {VIEWS} --episodes {EPISODES} --out {folder} --format mp4")
    return folder


def test_several_processes_make_the_same_bits(data: Path, tmp_path: Path) -> None:
    apv(f"{COMMAND} {VIEWS} --episodes {EPISODES} --out {tmp_path / 'data'} --processes 2")
    assert same(episodes_of(data), episodes_of(tmp_path / "data"))
    assert len(episodes_of(data)) == 2 * EPISODES


def test_views_are_of_the_same_moments(data: Path, tmp_path: Path) -> None:
    """One file a view: the same actions and rewards; the images are what that camera alone gives."""
    both = episodes_of(data)
    views = []
    for camera in ("fixed", "lookatcart"):
        apv(f"{COMMAND} --world.camera {camera} --episodes {EPISODES} --out {tmp_path / camera}")
        views.append(episodes_of(tmp_path / camera))
    for index in range(EPISODES):
        pair = both[2 * index : 2 * index + 2]
        assert same([{**pair[0], "image": pair[1]["image"]}], pair[1:])
        alone = [views[camera][index]["image"] for camera in range(2)]
        assert not np.array_equal(alone[0], alone[1])
        assert sorted(image.tobytes() for image in alone) == sorted(one["image"].tobytes() for one in pair)


def test_formats_have_the_same_frames(data: Path, mp4: Path, tmp_path: Path) -> None:
    wanted = {one["image"].tobytes() for one in episodes_of(data)}
    apv(f"{COMMAND} {VIEWS} --episodes {EPISODES} --out {tmp_path / 'store'} --format store")
    store = VideoStore(tmp_path / "store")
    names = [f"{view}/{index:06d}" for view in ("fixed", "lookatcart") for index in range(EPISODES)]
    assert [episode.name for episode in store] == names
    assert {store.read(place).tobytes() for place in range(len(store))} == wanted
    assert (store[0].camera, store[0].quality) == ("fixed", "fast")
    for place, name in enumerate(names):
        view, _, index = name.partition("/")
        frames = read_mp4(mp4 / "videos" / f"{index}-{view}.mp4")
        assert np.abs(frames.astype(int) - store.read(place)).max() <= 3


@pytest.mark.parametrize("form", ["npz", "mp4"])
def test_ingest_knows_what_collect_told(form: str, data: Path, mp4: Path, tmp_path: Path) -> None:
    """Camera, look, and which views are of one episode: those stay on one side of the split."""
    apv(f"ingest {mp4 if form == 'mp4' else data} --max-frames 6 --min-frames 2 --workers 1 --out {tmp_path / 'store'}")
    store = VideoStore(tmp_path / "store")
    assert {episode.quality for episode in store} == {"fast"}
    views: dict[Any, set[Any]] = {}
    for episode in store:
        views.setdefault(episode.source["episode"], set()).add(episode.camera)
    assert list(views.values()) == [{"fixed", "lookatcart"}] * (2 * EPISODES)  # each was cut in two
    corpus = StoreCorpus(tmp_path / "store")
    assert len(corpus.names) == 4 * EPISODES and len(set(corpus.split_keys)) == 2 * EPISODES


def test_pretraining_on_collected_mp4_files(data: Path, mp4: Path, tmp_path: Path) -> None:
    """They are decoded once, to the frames that were rendered but for rounding."""
    small = "--model.deter 8 --model.hidden 8 --model.stoch 3 --model.discrete 4 --model.cnn-depth 2 --batch 2"
    apv(f"pretrain --data {mp4} --out {tmp_path / 'run'} {small} --length 8 --steps 2 --validation 0.4 --device cpu")
    (folder,) = (tmp_path / "run" / "data").iterdir()
    store = VideoStore(folder)
    rendered = np.stack([one["image"] for one in episodes_of(data)]).astype(int)
    decoded = [store.read(place) for place in range(len(store))]
    assert len(decoded) == len(rendered)
    assert all(np.abs(rendered - one).reshape(len(rendered), -1).max(1).min() <= 3 for one in decoded)
    path = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert path is not None and load_checkpoint(path)[1]["qualities"] == ["fast"]


# Cards


def test_card(data: Path) -> None:
    card = (data / "README.md").read_text()
    files = list((data / "train_episodes").iterdir())
    frames = [len(one["image"]) for one in episodes_of(data)]
    assert f"| videos | {len(files)}: {EPISODES} episodes, views: fixed, lookatcart |" in card
    assert f"| frames | {sum(frames)}, {min(frames)} to {max(frames)} a video |" in card
    returns = [one["reward"].sum() for one in episodes_of(data)]
    assert f"| return | {np.mean(returns):.1f} on average, {min(returns):.1f} to {max(returns):.1f} |" in card
    described = json.loads((data / "dataset.json").read_text())
    assert described["world"]["quality"] == "fast" and described["cameras"] == ["fixed", "lookatcart"]


def test_command_on_the_card_makes_it_again(data: Path) -> None:
    match = re.search(r"^apv-fast (.*)$", (data / "README.md").read_text(), re.MULTILINE)
    assert match is not None
    name, *arguments = shlex.split(match[1])
    again = parse(name, arguments)
    cameras = ["--cameras", "fixed", "lookatcart"]
    assert again == parse("collect", f"{COMMAND} --episodes {EPISODES} --out {data}".split()[1:] + cameras)


def test_contact_sheet_shows_the_videos(data: Path) -> None:
    """Six videos: five frames each, of which the second is a third of the way through."""
    with Image.open(data / "contact_sheet.png") as picture:
        sheet = np.asarray(picture)
    frames = {frame.tobytes() for one in episodes_of(data) for frame in one["image"]}
    cells = [sheet[top : top + 64, left : left + 64] for top in range(0, 4 * 66, 66) for left in range(0, 8 * 66, 66)]
    shown = {cell.tobytes() for cell in cells[:30]}
    assert shown <= frames
    assert len(shown) > 15
    assert sheet.shape == (4 * 66 - 2, 8 * 66 - 2, 3)


# Stopping


def _journal(folder: Path) -> list[str]:
    """Complete lines."""
    path = folder / "episodes.jsonl"
    return path.read_text().split("\n")[:-1] if path.exists() else []


def _begin(folder: Path, options: str, ready: Callable[[int], bool]) -> subprocess.Popen[str]:
    """The command in a process group of its own, as a shell starts it; returns when the group is ``ready``."""
    command = [sys.executable, "-m", "apv_fast.cli", *f"{COMMAND} {VIEWS} --out {folder} {options}".split()]
    root = ROOT
    process = subprocess.Popen(command, cwd=root, text=True, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 120
    while not ready(process.pid):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.02)
    return process


def _members(group: int) -> list[str]:
    """Command lines of the processes of a group that are still there."""
    command_lines = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                command_lines.append((folder / "cmdline").read_text())
        except OSError:  # it has just ended
            continue
    return command_lines


def _players(group: int) -> list[str]:
    """Those of a group that play episodes."""
    return [line for line in _members(group) if "spawn_main" in line]


@pytest.mark.thorough
def test_killed_and_interrupted_it_goes_on(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    process = _begin(folder, "--episodes 500 --processes 2", lambda _: bool(_journal(folder)))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while _members(process.pid):
        assert time.monotonic() < deadline, "processes outlive their parent"
        time.sleep(0.05)
    with (folder / "episodes.jsonl").open("a") as journal:
        journal.write('{"episode": 17, "ret')
    (folder / "train_episodes" / "half.npz.99.tmp").write_bytes(b"half")
    before = len(_journal(folder))
    process = _begin(folder, f"--episodes {before + 500} --processes 2", lambda group: len(_players(group)) == 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does; those that play are importing
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in error and "Traceback" not in error and "died" not in error
    assert not _players(process.pid)
    done = [json.loads(line)["episode"] for line in _journal(folder)]
    assert before <= len(done) == len(set(done)) < before + 500
    assert f"| videos | {2 * len(done)}: {len(done)} episodes" in (folder / "README.md").read_text()
    apv(f"{COMMAND} {VIEWS} --out {folder} --episodes {max(EPISODES, max(done) + 1)}")
    assert not list(folder.rglob("*.tmp"))
    assert same(episodes_of(data), episodes_of(folder)[: 2 * EPISODES])
    assert len(episodes_of(folder)) == 2 * max(EPISODES, max(done) + 1)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_long_episode_is_given_up(
    processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody waits for minutes after Ctrl-C."""
    monkeypatch.setattr(interrupt, "PATIENCE_S", 0.1)
    folder = tmp_path / "data"

    def press() -> None:
        while not (folder / "episodes.jsonl").exists():
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    long = "--world.action-repeat 1 --world.time-limit 1000 --world.quality paper"
    assert main(f"{COMMAND} {VIEWS} {long} --out {folder} --episodes 4 --processes {processes}".split()) == 130
    thread.join()
    assert "stopped, 4 of 4 episodes are missing; the same command goes on" in capsys.readouterr().err
    assert not _journal(folder) and not multiprocessing.active_children()


def test_two_at_a_time_are_refused(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from apv_fast.data.collect_writers import Journal

    with Journal(data):
        error = refused(f"{COMMAND} {VIEWS} --episodes {EPISODES} --out {data}", capsys)
    assert "another process is writing to this folder" in error


# Choices


def test_what_cannot_be_collected(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"--out {tmp_path / 'data'}"
    for options, message in (
        ("--cameras fixed,back", "camera must be -1 \\(free\\), below 2, or one of fixed, lookatcart; not 'back'"),
        ("--cameras fixed fixed", "cameras are fixed, fixed; each must be there once"),
        ("--policy scripted", "policy is 'scripted', but dmc:cartpole-balance has no scripted expert"),
        ("--policy nowhere", "nowhere is not a run directory"),
        ("--processes 0", "processes is 0; it must be at least 1"),
        ("--episodes 0", "episodes is 0; it must be at least 1"),
    ):
        assert re.search(message, refused(f"{COMMAND} {out} {options}", capsys)), options
    assert not (tmp_path / "data").exists()
    for options, message in (("", "cameras is"), (f"{VIEWS} --format store", "format is 'npz' there")):
        assert message in refused(f"{COMMAND} --out {data} {options}", capsys)


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    apv("collect --list")
    page = capsys.readouterr().out
    for part in ("dmc: ", "dmc:walker-walk", "scripted", "random", "--list --env ID"):
        assert part in page
    apv("collect --list --env dmc:quadruped-walk")
    assert capsys.readouterr().out.startswith("dmc:quadruped-walk: cameras: global, x, ")


def test_scripted_experts(tmp_path: Path) -> None:
    """The paper's kind of videos: an expert, from several sides."""
    options: dict[str, Any] = {"env": "metaworld:reach", "policy": "scripted", "episodes": 1}
    options |= {"cameras": "corner,corner2,topview", "world.time-limit": 80, "world.quality": "fast"}
    command = " ".join(f"--{name} {value}" for name, value in options.items())
    apv(f"collect --preset metaworld {command} --out {tmp_path / 'data'}")
    videos = episodes_of(tmp_path / "data")
    assert [video["image"].shape for video in videos] == [(81, 64, 64, 3)] * 3
    assert len({video["image"].tobytes() for video in videos}) == 3
    assert "| success | 100% of the episodes |" in (tmp_path / "data" / "README.md").read_text()

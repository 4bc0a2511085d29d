"""The run directory: checkpoints that survive crashes, metrics that continue, progress, videos, plots, Ctrl-C."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from apv_fast.data import DiskError
from apv_fast.run import (
    CheckpointError,
    Metrics,
    Progress,
    RunDirectory,
    RunError,
    latest_checkpoint,
    load_checkpoint,
    load_into,
    load_latest,
    open_loop_grid,
    read_metrics,
    restore_rng,
    rng_state,
    save_checkpoint,
    stop_on_signal,
    write_gif,
)
from apv_fast.run.curves import published_curves
from apv_fast.run.plot import plot_runs
from tests.support.samples import small_disk, small_files

# The run directory


def test_a_run_keeps_its_configuration(tmp_path: Path) -> None:
    config = {"steps": 100, "model": {"deter": 8, "acts": ["elu"]}}
    run = RunDirectory.create(tmp_path / "new" / "run", config)
    assert RunDirectory.open(run.path).config() == config
    run.check_config({"steps": 900, "model": {"deter": 8, "acts": ("elu",)}}, may_change=("steps",))
    with pytest.raises(RunError, match=r"config\.json is of another configuration: model\.deter is 8 there and 9 now$"):
        run.check_config({"steps": 100, "model": {"deter": 9, "acts": ["elu"]}})


def test_a_used_directory_is_not_overwritten(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path, {"a": 1})
    with pytest.raises(RunError, match="is not empty: continue that run with --resume, choose another"):
        RunDirectory.create(tmp_path, {"a": 2})
    assert RunDirectory.open(tmp_path).config() == {"a": 1}


def test_a_directory_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"it has no config\.json"):
        RunDirectory.open(tmp_path)
    for content, message in (("{", "cannot be read"), ("[]", "must hold an object")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(RunError, match=f"config.json {message}"):
            RunDirectory.open(tmp_path).config()


def test_the_writer_clears_what_a_killed_one_left(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, {})
    run.checkpoints.mkdir()
    left = run.checkpoints / "step-000000000005.pt.123.tmp"
    left.touch()
    RunDirectory.open(tmp_path)
    assert left.exists(), "a reader touches nothing"
    RunDirectory.open(tmp_path, writer=True)
    assert not left.exists()


# Checkpoints


def test_checkpoints_come_back_and_old_ones_go(tmp_path: Path) -> None:
    states = [{"weights": {"w": torch.full((3,), float(step))}, "n": step, "names": ["a", "b"]} for step in range(5)]
    for step, state in enumerate(states):
        save_checkpoint(tmp_path, step, state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000000003.pt", "step-000000000004.pt"]
    loaded = load_latest(tmp_path)
    assert loaded
    path, step, state = loaded
    assert (path, step, state["n"], state["names"]) == (latest_checkpoint(tmp_path), 4, 4, ["a", "b"])
    assert torch.equal(state["weights"]["w"], states[4]["weights"]["w"])  # type: ignore[index]


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
    assert load_latest(tmp_path / "none") is None


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"n": 1})
    newest = save_checkpoint(tmp_path, 2, {"n": 2})
    newest.write_bytes(newest.read_bytes()[:-30])
    with pytest.raises(CheckpointError, match=f"{newest}: archive: "):
        load_checkpoint(newest)
    with pytest.warns(UserWarning, match=f"skipped a checkpoint: {newest}"):
        loaded = load_latest(tmp_path)
    assert loaded and loaded[1] == 1
    (tmp_path / "step-000000000001.pt").write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match=r"step-000000000001\.pt: archive"):
        load_latest(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"format": 1, "step": 1, "state": {}}, "format: must be 2, not 1; another version"),
        ({"weights": 1}, "format: this is not a checkpoint"),
        ([1], "format: this is not a checkpoint"),
        ({"format": 2, "step": 1, "state": Path("code")}, "archive: is damaged, or holds objects that could run code"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "step-000000000001.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


class Nested:
    """Something whose state has levels."""

    def __init__(self, size: int) -> None:
        self.state = {"count": 1, "moments": {"w": torch.zeros(size)}}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: Any, /) -> None:
        self.state = state


@pytest.mark.parametrize(
    ("target", "state", "message"),
    [
        (torch.nn.Linear(3, 4), {"bias": torch.zeros(4)}, r"model\.weight: is missing"),
        (
            torch.nn.Linear(3, 4),
            {"weight": torch.zeros(4, 5), "bias": torch.zeros(4)},
            r"model\.weight: must be a tensor \[4, 3\], not a tensor \[4, 5\]",
        ),
        (
            torch.nn.Linear(3, 4, bias=False),
            {"weight": torch.zeros(4, 3), "bias": torch.zeros(4)},
            r"model\.bias: is not part of this configuration",
        ),
        (Nested(3), {"count": 1, "moments": {"w": torch.zeros(2)}}, r"model\.moments\.w: must be a tensor \[3\]"),
        (Nested(3), {"count": 1, "moments": 7}, r"model\.moments: must be a dict, not a int"),
        (Nested(3), {"count": torch.zeros(2), "moments": {"w": torch.zeros(3)}}, r"model\.count: must be a int"),
    ],
)
def test_a_checkpoint_of_another_configuration(target: Any, state: dict[str, Any], message: str) -> None:
    before = copy.deepcopy(dict(target.state_dict()))
    with pytest.raises(CheckpointError, match=f"some/file.pt: {message}"):
        load_into(target, state, source="some/file.pt", field="model")
    assert str(dict(target.state_dict())) == str(before), "nothing was loaded"


@pytest.mark.parametrize("how", ["file size limit", "full file system"])
def test_a_full_disk_keeps_the_older_checkpoints(tmp_path: Path, how: str) -> None:
    with small_files(200_000) if how == "file size limit" else small_disk(tmp_path, "200k"):
        kept = [save_checkpoint(tmp_path, step, {"n": step}) for step in (1, 2)]
        with pytest.raises(DiskError, match=f"cannot write {tmp_path}/step-000000000003.pt"):
            save_checkpoint(tmp_path, 3, {"w": torch.rand(100_000)})
        assert sorted(tmp_path.iterdir()) == kept
        loaded = load_latest(tmp_path)
        assert loaded and loaded[1] == 2


SAVER = """
import sys, torch
from pathlib import Path
from apv_fast.run import save_checkpoint
for step in range(10**6):
    save_checkpoint(Path(sys.argv[1]), step, {"w": torch.full((200_000,), float(step))})
    print(step, flush=True)
"""


def test_kill_9_while_saving_loses_no_checkpoint(tmp_path: Path) -> None:
    for attempt in range(3):
        directory = tmp_path / str(attempt)
        with subprocess.Popen(
            [sys.executable, "-c", SAVER, str(directory)], stdout=subprocess.PIPE, text=True
        ) as saver:
            assert saver.stdout
            for _ in range(3):
                saver.stdout.readline()
            time.sleep(0.011 * attempt)
            saver.send_signal(signal.SIGKILL)
            last = max([2, *map(int, saver.stdout.read().split())])
        steps = sorted(load_checkpoint(path)[0] for path in directory.glob("step-*.pt"))
        assert steps[-1] in (last, last + 1)  # it may have been killed between saving and saying so
        for path in directory.glob("step-*.pt"):
            step, state = load_checkpoint(path)
            assert torch.equal(state["w"], torch.full((200_000,), float(step)))


@settings(max_examples=20, deadline=None)
@given(draws=st.integers(0, 700))
def test_random_generators_continue_where_they_were(draws: int) -> None:
    torch.rand(draws)
    file = io.BytesIO()
    torch.save(rng_state(), file)
    expected = torch.rand(9)
    torch.manual_seed(5)
    file.seek(0)
    restore_rng(torch.load(file, weights_only=True))
    assert torch.equal(torch.rand(9), expected)


# Metrics


def test_metrics_lines(tmp_path: Path) -> None:
    before = time.time()
    with Metrics(tmp_path, tensorboard=False) as metrics:
        metrics.scalars(5, {"loss": 0.25, "eval_return": np.float32(3)})
        on_disk = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(on_disk)
    assert line.pop("time") == pytest.approx((before + time.time()) / 2, abs=1)
    assert line == {"step": 5, "loss": 0.25, "eval_return": 3.0}


@settings(max_examples=20, deadline=None)
@given(values=st.lists(st.floats(width=64), min_size=1, max_size=6), step=st.integers(-1, 6))
def test_metrics_of_a_resumed_run(values: list[float], step: int) -> None:
    """Lines up to the checkpoint's step stay exactly as they were, NaN and infinities too; later ones go."""
    with tempfile.TemporaryDirectory() as name:
        with Metrics(Path(name), tensorboard=False) as metrics:
            for index, value in enumerate(values):
                metrics.scalars(index, {"value": value})
        lines = (Path(name) / "metrics.jsonl").read_text().splitlines()
        with Metrics(Path(name), tensorboard=False, resume_step=step) as metrics:
            metrics.scalars(100, {"value": 1})
        kept = lines[: step + 1]
        assert (Path(name) / "metrics.jsonl").read_text().splitlines()[:-1] == kept
        assert not any(word in line for line in kept for word in (": NaN", ": Inf", ": -Inf")), "valid JSON"
        read = [line["value"] for line in read_metrics(Path(name) / "metrics.jsonl")]
    np.testing.assert_array_equal(read, [*values[: step + 1], 1.0])


def test_a_line_that_a_crash_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "time": 0, "loss": 2}\n{"step": 2, "ti')
    assert [line["step"] for line in read_metrics(path)] == [1]
    Metrics(tmp_path, tensorboard=False, resume_step=9).close()
    assert path.read_text() == '{"step": 1, "time": 0, "loss": 2}\n'
    path.write_text('{"step": 2, "ti\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 1 is damaged"):
        list(read_metrics(path))


def test_metrics_on_a_full_disk(tmp_path: Path) -> None:
    with Metrics(tmp_path, tensorboard=False) as metrics:
        metrics.scalars(1, {"loss": 1})
        with small_files(150), pytest.raises(DiskError, match=f"cannot write {tmp_path}/metrics.jsonl .*free there"):
            for step in range(2, 9):
                metrics.scalars(step, {"loss": 1})
    lines = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert lines == list(range(1, len(lines) + 1))
    assert 1 <= len(lines) <= 3


def test_tensorboard_gets_the_numbers_and_a_resumed_run_drops_later_ones(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Metrics(tmp_path) as metrics:
        for step in (1, 2, 3):
            metrics.scalars(step, {"loss": step / 4})
    with Metrics(tmp_path, resume_step=1) as metrics:
        metrics.scalars(2, {"loss": 9.0})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.25), (2, 9.0)]


def test_tensorboard_shows_the_video(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Metrics(tmp_path) as metrics:
        metrics.video(2, "open_loop", np.zeros((4, 6, 8, 3), np.uint8))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    [image] = events.Images("open_loop")
    assert (image.step, image.width, image.height) == (2, 8, 6)
    assert image.encoded_image_string.startswith(b"GIF89a")


# Progress


def test_progress_prints_rate_and_time_left_now_and_then() -> None:
    now = 0.0
    out = io.StringIO()
    with Progress("pretrain", 1000, start=100, unit="update", interval_s=30, file=out, clock=lambda: now) as progress:
        for step in range(101, 1001):
            now += 0.5
            progress.update(step, "loss 1.5" if step == 1000 else "")
    lines = out.getvalue().splitlines()
    assert lines[0] == "pretrain: 160/1000 updates, 2 updates/s, 0:07:00 left"
    assert lines[-1] == "pretrain: 1000/1000 updates, 2 updates/s, 0:00:00 left  loss 1.5"
    assert len(lines) == 15, "a line every 30 s of 450 s"


def test_progress_of_slow_steps() -> None:
    now = 0.0
    out = io.StringIO()
    progress = Progress("train", 10_000, interval_s=0, file=out, clock=lambda: now)
    progress.update(0)
    now = 4.0
    progress.update(1)
    assert out.getvalue() == "train: 0/10000 steps\ntrain: 1/10000 steps, 4 s/step, 11:06:36 left\n"


def test_progress_on_a_terminal_is_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with Progress("train", 4, file=out) as progress:
        for step in range(5):
            progress.update(step)
    assert "━" in out.getvalue()
    assert "4/4 steps" in out.getvalue()


# Videos


def test_open_loop_grid_stacks_truth_model_and_error() -> None:
    generator = np.random.default_rng(0)
    truth, model = generator.integers(0, 256, (2, 6, 5, 4, 4, 3), dtype=np.uint8)
    grid = open_loop_grid(truth, model)
    assert grid.dtype == np.uint8
    assert grid.shape == (5, 12, 24, 3)
    for b in range(6):
        column = grid[:, :, 4 * b : 4 * b + 4]
        np.testing.assert_array_equal(column[:, :4], truth[b])
        np.testing.assert_array_equal(column[:, 4:8], model[b])
        error = (model[b].astype(float) - truth[b] + 255) / 2
        np.testing.assert_array_less(np.abs(column[:, 8:] - error), 0.51)
    assert (open_loop_grid(truth, truth)[:, 8:] == 127).all(), "grey where both agree"


def test_gif_shows_the_frames(tmp_path: Path) -> None:
    frames = np.zeros((3, 4, 5, 3), np.uint8)
    frames[0, :, :, 0], frames[1, :2, :, 1], frames[2, :, 2:, 2] = 250, 240, 230
    path = write_gif(tmp_path / "videos" / "a.gif", frames, fps=10, scale=2)
    with Image.open(path) as image:
        assert (image.n_frames, image.size, image.info["duration"]) == (3, (10, 8), 100)  # type: ignore[attr-defined]
        for index, frame in enumerate(frames):
            image.seek(index)
            shown = np.asarray(image.convert("RGB"))
            np.testing.assert_array_equal(shown[::2, ::2], frame)
            np.testing.assert_array_equal(shown[1::2, 1::2], frame)


@pytest.mark.parametrize(
    ("frames", "options", "message"),
    [
        (np.zeros((3, 4, 5, 3), np.float32), {}, "frames must be uint8"),
        (np.zeros((0, 4, 5, 3), np.uint8), {}, "frames must be uint8"),
        (np.zeros((3, 4, 5), np.uint8), {}, "frames must be uint8"),
        (np.zeros((3, 4, 5, 3), np.uint8), {"scale": 0}, "scale at least 1"),
        (np.zeros((3, 4, 5, 3), np.uint8), {"fps": 0}, "fps must be positive"),
    ],
)
def test_bad_videos(tmp_path: Path, frames: np.ndarray, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_gif(tmp_path / "a.gif", frames, **options)
    assert list(tmp_path.iterdir()) == []


def test_bad_grids() -> None:
    good = np.zeros((1, 2, 4, 4, 3), np.uint8)
    with pytest.raises(
        ValueError, match=r"model must be uint8 \[B, T, height, width, 3\], not uint8 \[1, 1, 4, 4, 3\]"
    ):
        open_loop_grid(good, good[:, :1])
    with pytest.raises(ValueError, match="truth must be uint8"):
        open_loop_grid(good[0], good[0])


# Plots


def test_published_curves() -> None:
    curves = published_curves("dmc_quadruped_walk")
    assert set(curves) == {"DreamerV2", "APV (Locomotion)", "APV (Manipulation)"}
    steps, scores = curves["DreamerV2"]
    assert scores.shape == (8, len(steps))
    assert steps[0] == 2000
    assert set(published_curves("metaworld_reach")) == {"DreamerV2", "APV"}
    assert published_curves("dmc_walker_walk") == {}


def test_plot(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with Metrics(tmp_path / name, tensorboard=False) as metrics:
            for step in range(3):
                metrics.scalars(step, {"eval_return": step, "env_step": 2 * step, "loss": math.nan})
    plain = plot_runs([tmp_path / "one"], tmp_path / "plots" / "plain.png")
    rich = plot_runs([tmp_path / "one", tmp_path / "two"], tmp_path / "rich.png", task="dmc_quadruped_walk")
    with Image.open(plain) as first, Image.open(rich) as second:
        assert first.format == second.format == "PNG"
        assert first.size == second.size == (1050, 675)
        assert first.tobytes() != second.tobytes()
    with pytest.raises(
        ValueError, match=r"one/metrics\.jsonl has no metric 'reward'; it has: env_step, eval_return, loss"
    ):
        plot_runs([tmp_path / "one"], tmp_path / "none.png", metric="reward")
    with pytest.raises(ValueError, match=r"three/metrics\.jsonl does not exist"):
        plot_runs([tmp_path / "three"], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


# Ctrl-C


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_aborts(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with stop_on_signal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert "stopping at the next safe point" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before

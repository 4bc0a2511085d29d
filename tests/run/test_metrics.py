"""Metrics: lines that a resumed run continues, and TensorBoard's copy of them."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apv_fast.data import DiskError
from apv_fast.run import (
    Metrics,
    read_metrics,
)
from tests.support.samples import small_files


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

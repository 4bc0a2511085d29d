"""Progress: rate and time left."""

from __future__ import annotations

import io

from apv_fast.run import (
    Progress,
)


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

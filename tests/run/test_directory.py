"""The run directory: its configuration, and what is in the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from apv_fast.run import (
    RunDirectory,
    RunError,
)


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

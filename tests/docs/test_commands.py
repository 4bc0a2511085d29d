"""The command lines that the pages show exist: options of apv-fast, modules of Python, targets of make."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from apv_fast import cli
from apv_fast.config import PRESETS, to_dict
from apv_fast.run import RunDirectory
from docs.generators.pages import ROOT, command_lines, documents

COMMANDS = [line for page in documents() for line in command_lines(page, "apv-fast")]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_apv_fast_takes_the_command(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name, *rest = arguments
    if "--resume" in rest:  # the settings are those of the run
        config = getattr(PRESETS["small"], name)
        RunDirectory.create(rest[rest.index("--out") + 1], to_dict(config))
    cli.parse(name, rest)


def test_every_command_is_shown() -> None:
    assert {arguments[0] for arguments in COMMANDS} >= set(cli.COMMANDS) - {"demo", "export", "shards"}


def test_modules_that_are_run_exist() -> None:
    shown = {line[0] for page in documents() for line in command_lines(page, "python -m")}
    assert "bench" in shown
    assert not [module for module in shown if importlib.util.find_spec(module) is None]


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = {line[0] for page in documents() for line in command_lines(page, "make")}
    assert shown >= {"docs", "test"}
    assert not shown - targets

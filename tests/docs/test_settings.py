"""The settings page has every setting, group, preset and environment variable."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from apv_fast.cli import COMMANDS
from apv_fast.config import PRESETS, FinetuneConfig, ModelConfig
from docs.generators import settings
from docs.generators.pages import ROOT

PAGE = ROOT / "docs/settings.md"
READS = re.compile(r"environ(?:\.get\(|\.setdefault\(|\[)\s*['\"](\w+)['\"]|\"(\w+)\" (?:not )?in os\.environ")
INTERNAL = {"APV_FAST_TEST_REPORT", "APV_FAST_SANITIZED_MODULE"}  # between processes of ours
OF_OTHERS = {"SUBMITIT_PREEMPT_SIGNAL", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_of_a_command_is_in_the_tables(command: str) -> None:
    own, groups = settings.commands(), settings.shared_groups()
    section = own.split(f"### apv-fast {command} ")[1].split("\n### ")[0]
    for field in dataclasses.fields(COMMANDS[command].config):
        option = f"`--{field.name.replace('_', '-')}"
        assert option in section or f"`{field.name.upper()}`" in section, f"{command}: {option}"
    for _, _, group in settings.groups(COMMANDS[command].config):
        table = groups.split(f"### {group.__name__} ")[1].split("\n### ")[0]
        for row in settings.rows(group):
            assert row.option in table
            assert row.text


def test_a_row_has_the_default_the_values_and_the_docstring() -> None:
    (row,) = (row for row in settings.rows(ModelConfig) if row.option == "--precision")
    assert row == settings.Row(
        "--precision",
        "`fp32`, `bf16`",
        "`fp32`",
        "Of the products; weights, statistics and losses are float32 either way.",
    )


def test_a_setting_without_a_docstring_is_an_error() -> None:
    @dataclass(frozen=True)
    class Config:
        """Settings."""

        told: int = 1
        """What it is."""
        untold: int = 2

    with pytest.raises(KeyError, match="untold"):
        settings.rows(Config)


def test_presets_show_what_differs_and_nothing_else() -> None:
    table = settings.presets()
    assert "| `finetune` | dmc | metaworld | atari | small |" in table
    assert "| `--world.action-repeat` | `2` | `1` | `4` | `2` |" in table
    assert "--behavior.discount`" not in table
    small = PRESETS["small"].finetune
    assert isinstance(small, FinetuneConfig)
    assert f"`{small.steps}`" in table


def test_every_environment_variable_is_on_the_page() -> None:
    documented = set(re.findall(r"`([A-Z][A-Z_]+)`", PAGE.read_text()))
    sources = [ROOT / "setup.py", *(path for folder in ("apv_fast", "kernels") for path in _python(ROOT / folder))]
    read = {name for path in sources for match in READS.findall(path.read_text()) for name in match if name}
    named = {
        name
        for path in [*sources, *_python(ROOT / "bench"), *_python(ROOT / "tests")]
        for name in re.findall(r"\"(APV_FAST_[A-Z_]+)\"", path.read_text())
    }
    assert {"MUJOCO_GL", "RANK", "APV_FAST_CUDA"} <= read
    assert not (read | named) - documented - INTERNAL - OF_OTHERS
    ours = {name for name in documented if name.startswith("APV_FAST_")}
    assert not ours - named - read, "the page has variables that nothing reads"


def _python(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "docs" not in path.parts)

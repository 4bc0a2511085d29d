"""Runs that several tests read and none changes; each takes some seconds, so a process makes it once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import FINETUNE, PRETRAIN, WORLD, apv


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos."""
    folder = tmp_path_factory.mktemp("videos") / "data"
    apv(f"collect --env dmc:cartpole-balance --episodes 2 --out {folder} {WORLD}")
    return folder


@pytest.fixture(scope="session")
def pretrained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-training run."""
    run = tmp_path_factory.mktemp("pretrain") / "run"
    apv(f"pretrain --data {data} --out {run} --steps 12 {PRETRAIN}")
    return run


@pytest.fixture(scope="session")
def finetuned(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuning run."""
    run = tmp_path_factory.mktemp("finetune") / "run"
    apv(f"finetune --out {run} --pretrained {pretrained} --steps 50 {FINETUNE}")
    return run

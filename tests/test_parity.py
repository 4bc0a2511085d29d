"""The comparison with the official implementation: the golden files agree, and a planted error is found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from apv_fast.backend import IMPLEMENTATIONS
from tests.parity import compare, main

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"


def change(path: Path, tensor: str, folder: Path, factor: float) -> Path:
    """A copy of ``path`` in ``folder`` with one tensor multiplied by ``factor``."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    arrays[tensor] = arrays[tensor] * np.asarray(factor, arrays[tensor].dtype)
    copy = folder / path.name
    with copy.open("wb") as out:
        np.savez(out, **arrays)
    return copy


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.npz")), ids=lambda path: path.stem)
def test_agrees_with_the_official_implementation(path: Path) -> None:
    report = compare(path)
    assert report.passed, report
    assert report.compared >= 5


# What is 0.1 % off is found, be it a weight (everything after it differs), an expected value or an expected gradient.
@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        ("actor_trunc_normal", "entropy"),
        ("behavior_discrete", "w.actor.dense0.kernel"),
        ("behavior_clipped", "behavior.critic_loss"),
        ("cnn", "dec.conv3.bias"),
        ("cnn", "grad.enc.conv0.kernel"),
        ("finetune_metaworld", "step1.queue"),
        ("kl_free", "kl3.loss"),
        ("lambda_return", "grad_bootstrap"),
        ("optimizer", "a5"),
        ("optimizer_strong", "norm0"),
        ("pretrain_metaworld", "metric.image_loss"),
        ("rssm_action_conditional", "w.gru.kernel"),
        ("rssm_action_free", "imagine.deter"),
        ("rssm_gaussian", "mode.prior.std"),
        ("stream_norm", "mag2"),
    ],
)
def test_a_planted_error_is_found(file: str, tensor: str, tmp_path: Path) -> None:
    report = compare(change(GOLDEN / f"{file}.npz", tensor, tmp_path, 1.001))
    assert not report.problem, report
    assert not report.passed, report


def test_nan_and_wrong_shapes_are_found(tmp_path: Path) -> None:
    assert not compare(change(GOLDEN / "lambda_return.npz", "returns", tmp_path, float("nan"))).passed
    with np.load(GOLDEN / "lambda_return.npz") as file:
        arrays = {name: file[name] for name in file.files}
    np.savez(tmp_path / "short.npz", **(arrays | {"returns": arrays["returns"][:-1]}))
    assert not compare(tmp_path / "short.npz").passed


def test_what_cannot_be_compared_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["parity", str(tmp_path)])
    assert main() == 1  # no files at all
    assert "has no .npz files" in capsys.readouterr().err
    (tmp_path / "lambda_return.npz").write_bytes((GOLDEN / "lambda_return.npz").read_bytes())
    assert main() == 0
    np.savez(tmp_path / "unknown.npz", anything=np.zeros(3))
    (tmp_path / "damaged.npz").write_bytes(b"PK nothing")
    assert main() == 1
    out = capsys.readouterr().out
    assert "unknown.npz: not compared: ValueError: its tensors fit no known kind" in out
    assert "damaged.npz: not compared" in out
    assert "1 of 3 files agree" in out


def test_command() -> None:
    arguments = [sys.executable, "-m", "tests.parity", str(GOLDEN), "--backend", "reference"]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    count = len(lines) - 1  # the last one is the summary
    assert count >= len(list(GOLDEN.glob("*.npz")))
    assert all(line.startswith("ok ") for line in lines[:-1])
    assert lines[-1].startswith(f"{count} of {count} files agree")


def test_backend_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    only = {"reference": IMPLEMENTATIONS["lambda_return"]["reference"]}
    monkeypatch.setitem(IMPLEMENTATIONS, "lambda_return", only)
    assert compare(GOLDEN / "lambda_return.npz", backend="reference").passed
    assert "backend 'cpu' cannot run" in compare(GOLDEN / "lambda_return.npz", backend="cpu").problem

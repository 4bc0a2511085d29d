"""NVTX ranges: where they are when they are on, and that nothing is left of them when they are off."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import timeit
from pathlib import Path

import pytest
import torch

from apv_fast import ops, profile

ROOT = Path(__file__).resolve().parents[1]

# A stand-in for the nvtx package, and two updates at the smallest sizes; prints the ranges that were opened.
UPDATES = """
import sys, types
opened = []
class annotate:
    def __init__(self, message, domain):
        self.message = message
        assert domain == "apv_fast"
    def __enter__(self):
        opened.append(self.message)
    def __exit__(self, *exception):
        opened.append("end")
    def __call__(self, function):
        def inside(*args, **kwargs):
            with self:
                return function(*args, **kwargs)
        return inside
sys.modules["nvtx"] = types.SimpleNamespace(annotate=annotate)
from tests.support.learners import make, make_batch
import torch
for kind in ("video", "stacked"):
    make(kind).update(make_batch())
agent = make("stacked")
agent.act(make_batch()["image"][:, 0], torch.tensor([True, True]), None, explore=True)
depth = 0
for name in opened:
    depth += -1 if name == "end" else 1
assert depth == 0
print(*sorted(set(opened) - {"end"}))
"""


def test_ranges_of_phases_and_ops() -> None:
    settings = {"OMP_NUM_THREADS": "1", "APV_FAST_NVTX": "1", "APV_FAST_BACKEND": "reference"}
    environment = {**os.environ, **settings}
    command = [sys.executable, "-c", UPDATES]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = set(done.stdout.split())
    phases = {"update", "world_model_loss", "backward", "optimizer_step", "behavior_losses", "act"}
    phases |= {"imagine", "target", "actor_critic"}
    assert phases <= names
    assert {"rssm_observe", "stacked_observe", "rssm_rollout", "rssm_step", "kl_balance", "lambda_return"} <= names


def test_ranges_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "ENABLED", True)
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ImportError, match="is 1, but the nvtx package is not installed and torch sees no CUDA device"):
        profile.annotate("a")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range", lambda name: contextlib.nullcontext(f"torch's {name}"))
    with profile.annotate("a") as name:
        assert name == "torch's a"


def test_the_real_package(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nvtx")
    monkeypatch.setattr(profile, "ENABLED", True)
    with profile.annotate("a"):
        assert profile.annotated("b")(lambda x: x + 1)(1) == 2


def test_ranges_of_torchs_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "ENABLED", True)
    monkeypatch.setattr(profile, "TORCH", True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler, profile.annotate("a"):
        profile.annotated("b")(torch.ones)(3)
    assert {"a", "b"} <= {event.name for event in profiler.events() or ()}


def test_off_costs_next_to_nothing() -> None:
    """One shared object, and ops as they are; a range is some 100 ns of Python."""
    assert profile.annotate("a") is profile.annotate("b")

    def function() -> None:
        """Anything."""

    assert profile.annotated("a")(function) is function

    def ranged() -> None:
        with profile.annotate("a"):
            pass

    assert min(timeit.repeat(ranged, number=1000, repeat=5)) < 1000 * 5e-6


def test_off_breaks_no_compiled_graph() -> None:

    @torch.compile(backend="eager", fullgraph=True)
    def ranged(x: torch.Tensor) -> torch.Tensor:
        with profile.annotate("a"):
            return ops.knn_bonus(x, x, k=1, backend="reference")

    assert not ranged(torch.eye(3)).any()

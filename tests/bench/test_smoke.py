"""The checks that ``python -m bench.device`` begins with, on the CPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("bench", reason="bench/ is not installed; it runs from a checkout")
from apv_fast.backend import probe
from bench.gpu import (
    barrier,
    smoke,
)  # fmt: skip
from tests.support.rssm_cases import Sizes


def test_orders_judges_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(barrier, "stress", lambda kind, rounds, fault="": 3 if fault else 0)
    assert smoke.orders("triton")["wrong reads"] == 0
    monkeypatch.setattr(barrier, "stress", lambda kind, rounds, fault="": 0)
    with pytest.raises(AssertionError, match="with a fault planted"):
        smoke.orders("cuda")
    monkeypatch.setattr(barrier, "stress", lambda kind, rounds, fault="": 1)
    with pytest.raises(AssertionError, match="1 reads of a wrong round"):
        smoke.orders("cuda")


class Learner:
    """A weight that random numbers move; ``wrong`` moves it otherwise in a graph from some update on."""

    def __init__(self, graph: str, wrong: int = 1000) -> None:
        self.weight, self.updates, self.wrong = torch.zeros(3), 0, wrong if graph == "on" else 1000

    def update(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.updates += 1
        self.weight += torch.randn(3) + (1e-6 if self.updates >= self.wrong else 0)
        return {"loss": self.weight.sum()}

    def tensors(self) -> list[torch.Tensor]:
        return [self.weight]


def test_replays_are_held_to_the_bit() -> None:
    facts = smoke.replayed(Learner, {}, 20)
    assert facts["updates"] == 20 and facts["first loss"] != facts["last loss"]
    with pytest.raises(AssertionError, match="first update with another loss: 7;"):
        smoke.replayed(lambda graph: Learner(graph, 7), {}, 20)


def test_checks_are_those_of_the_issue(monkeypatch: pytest.MonkeyPatch) -> None:
    scans_ = [f"observe {backend} B={batch}" for backend in ("cuda", "triton") for batch in (16, 50)]
    assert set(smoke.CHECKS) == {"barrier triton", "barrier cuda", "pre-training update, replayed", *scans_}
    with pytest.raises(RuntimeError, match="CUDA device"):
        smoke.CHECKS["observe cuda B=16"]()


@pytest.mark.skipif(probe("triton").isa != "interpreter", reason="for Triton's interpreter")
def test_the_check_of_the_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a small size in the interpreter; a wrong product is noticed."""
    from tests.support import rssm_cases, rssm_errors

    monkeypatch.setattr(rssm_cases, "full", lambda batch, length: Sizes(2, 3, 5, 2, 3, 8, 7, 2, 3))
    assert smoke.observe("triton", 16)
    measure = rssm_errors.measure
    monkeypatch.setattr(
        rssm_errors, "measure", lambda *a: {k: (1e2 * ours, own) for k, (ours, own) in measure(*a).items()}
    )
    with pytest.raises(AssertionError, match="error"):
        smoke.observe("triton", 16)

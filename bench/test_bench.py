"""The same cases under pytest-benchmark: ``pytest bench --benchmark-only``; compare contestants within a group."""

from __future__ import annotations

import functools

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.registry import FORWARD, FORWARD_BACKWARD, Case, Problem, contestants, select

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.lru_cache(maxsize=1)  # consecutive tests share their inputs; a full-size model at a time is enough
def problem(case: Case) -> Problem:
    torch.manual_seed(0)
    return case.build(DEVICE, case.dtype, **case.shape)


PLAYERS = [(case, backend) for case in select() for backend in contestants(case, DEVICE)[0]]


@pytest.mark.parametrize("passed", [FORWARD, FORWARD_BACKWARD])
@pytest.mark.parametrize("case, backend", PLAYERS, ids=[f"{case.name} {backend}" for case, backend in PLAYERS])
def test_case(benchmark: BenchmarkFixture, case: Case, backend: str, passed: str) -> None:
    if passed not in problem(case).passes:
        pytest.skip(f"{case.op} has no pass {passed}")
    benchmark.group = f"{case.name} {passed}"

    def work() -> None:
        problem(case).passes[passed](backend)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(work, rounds=5, warmup_rounds=1)

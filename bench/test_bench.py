"""The same cases under pytest-benchmark: ``pytest bench --benchmark-only``; compare contestants within a group."""

from __future__ import annotations

import functools

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from apv_fast.backend import PROBES
from bench.registry import FORWARD, FORWARD_BACKWARD, Case, Problem, contestants, select

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.lru_cache(maxsize=1)  # consecutive tests share their inputs; a full-size model at a time is enough
def problem(case: Case) -> Problem:
    torch.manual_seed(0)
    return case.build(DEVICE, case.dtype, **case.shape)


@pytest.mark.parametrize("backend", [*PROBES, "auto"])
@pytest.mark.parametrize("passed", [FORWARD, FORWARD_BACKWARD])
@pytest.mark.parametrize("case", select(), ids=lambda case: case.name)
def test_case(benchmark: BenchmarkFixture, case: Case, passed: str, backend: str) -> None:
    names, left_out = contestants(case, DEVICE)
    if backend not in names:
        pytest.skip(left_out.get(backend, f"{case.op} has no row for {backend}"))
    if passed not in problem(case).passes:
        pytest.skip(f"{case.op} has no {passed}")
    benchmark.group = f"{case.name} {passed}"

    def work() -> None:
        problem(case).passes[passed](backend)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(work, rounds=5, warmup_rounds=1)

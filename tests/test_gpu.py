"""What only a GPU can show: full sizes, the memory order of the grid barrier, bits that repeat, capture in a graph.

``python -m bench.device`` runs these, and with them the shared test bodies, which take a GPU where there is one.
Tests marked ``sanitize`` are small enough for compute-sanitizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import astuple

import pytest
import torch
from torch import Tensor

from apv_fast.backend import AUTO_ORDER, IMPLEMENTATIONS, probe
from tests.support.rssm_cases import CASES, SIZES, EqualSizes, full, make_case
from tests.support.rssm_errors import LEAVES_NOT, REFERENCE_ERROR, assert_exact

pytest.importorskip("bench", reason="bench/ is not installed; it runs from a checkout")
from bench.gpu import barrier
from bench.gpu.graphs import capture
from bench.registry import Case, select

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch finds no CUDA device"),
]

DEVICE = torch.device("cuda")
BACKENDS = [name for name in AUTO_ORDER["cuda"] if name != "reference"]
ENGINES = [(case, backend) for case, (op, _) in CASES.items() for backend in BACKENDS if backend in IMPLEMENTATIONS[op]]
SCANS = {op for op, _ in CASES.values()}
OPS = [
    (op, backend) for op, row in IMPLEMENTATIONS.items() for backend in BACKENDS if backend in row and op not in SCANS
]
PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
TF32_ERROR = 1e-2  # as rssm_errors.REFERENCE_ERROR: the largest error of PyTorch itself that is believed
RUNS = 20
ROUNDS, FAULTY_ROUNDS = 100_000, 20_000


def need(backend: str, dtype: torch.dtype) -> None:
    """Skip if the backend cannot run here or does not take the dtype."""
    status = probe(backend)
    if not status.available:
        pytest.skip(f"{backend}: {status.reason}")
    if dtype not in status.dtypes:
        pytest.skip(f"{backend} does not take {dtype}")


@pytest.fixture(params=PRECISIONS)
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A precision of the products, which PyTorch's own use too."""
    name: str = request.param
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    if name == "tf32":
        monkeypatch.setitem(REFERENCE_ERROR, torch.float32, TF32_ERROR)
    yield name
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("batch", [16, 50, 64, 70])
@pytest.mark.parametrize(("case", "backend"), [e for e in ENGINES if e[0] in ("observe", "stacked")])
def test_full_size(case: str, backend: str, batch: int, precision: str) -> None:
    """Fifty steps; 64 rows are the most of one grid, 70 are two."""
    need(backend, PRECISIONS[precision])
    assert_exact(case, backend, full(batch, 50), PRECISIONS[precision], True)


@pytest.mark.parametrize("batch", [16, 50])
@pytest.mark.parametrize("backend", [backend for case, backend in ENGINES if case == "stacked"])
def test_full_size_of_two_equal_models(backend: str, batch: int, precision: str) -> None:
    """As in production: the tiles of both end where the models do, and one compiled function serves both."""
    need(backend, PRECISIONS[precision])
    assert_exact("stacked", backend, EqualSizes(*astuple(full(batch, 50))), PRECISIONS[precision], True)


@pytest.mark.parametrize(("case", "backend"), [e for e in ENGINES if e[0] in ("imagine", "step", "stacked_concat")])
def test_full_size_of_the_others(case: str, backend: str, precision: str) -> None:
    need(backend, PRECISIONS[precision])
    assert_exact(case, backend, full(400 if case == "imagine" else 16, 15), PRECISIONS[precision], True)


@pytest.mark.parametrize("driver", ["persistent", "phases"])
def test_both_drivers_of_the_triton_scan(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need("triton", torch.bfloat16)
    if "triton" not in IMPLEMENTATIONS["rssm_observe"]:
        pytest.skip("the scan has no Triton implementation")
    monkeypatch.setenv("APV_FAST_SCAN", driver)
    assert_exact("observe", "triton", full(16, 50), torch.bfloat16, True)


# Small enough for compute-sanitizer


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", ["odd", "gaussian", "wide"])
@pytest.mark.parametrize(("case", "backend"), ENGINES)
def test_small_scans(case: str, backend: str, sizes: str, dtype: torch.dtype) -> None:
    need(backend, dtype)
    assert_exact(case, backend, SIZES[sizes], dtype, True)


def cases_of(op: str) -> list[Case]:
    """The op's cases of the benchmark, the one with the fewest numbers first."""
    return sorted(
        (case for case in select(slow=True) if case.op == op), key=lambda case: math.prod(case.shape.values())
    )


@pytest.mark.sanitize
@pytest.mark.parametrize(("op", "backend"), OPS)
def test_small_ops_run(op: str, backend: str) -> None:
    """Only that nothing bad happens; the op's own tests compare its values."""
    case = cases_of(op)[0]
    need(backend, case.dtype)
    for run in case.build(DEVICE, case.dtype, **case.shape).passes.values():
        run(backend)
    torch.cuda.synchronize()


# The grid barrier


@pytest.mark.parametrize("kind", barrier.KINDS)
def test_barrier_orders_what_programs_write_and_read(kind: str) -> None:
    """Every program reads what another has written in the same round, 100 000 times."""
    assert barrier.stress(kind, ROUNDS) == 0


@pytest.mark.parametrize("fault", barrier.FAULTS)
@pytest.mark.parametrize("kind", barrier.KINDS)
def test_a_wrong_order_is_noticed(kind: str, fault: str) -> None:
    assert barrier.stress(kind, FAULTY_ROUNDS, fault) > 0


# Bits that repeat, and graphs

Work = Callable[[], list[Tensor]]


def scan_work(case: str, backend: str, dtype: torch.dtype) -> Work:
    """Outputs of a full-size case, and gradients of everything that has one."""
    sizes = full(16, 10)
    tensors = make_case(case, sizes, dtype, device="cuda")
    leaves = {name: x.requires_grad_() for name, x in tensors.items() if not name.endswith(LEAVES_NOT)}

    def outputs() -> list[Tensor]:
        return list(CASES[case][1](tensors | leaves, sizes, backend, True).values())

    cotangents = [torch.randn_like(x) for x in outputs()]

    def work() -> list[Tensor]:
        out = outputs()
        pairs = [(x, g) for x, g in zip(out, cotangents, strict=True) if x.requires_grad]
        inputs = list(leaves.values())
        grads = torch.autograd.grad([x for x, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)
        return [x.detach() for x in out] + [g for g in grads if g is not None]

    return work


def op_work(case: Case, backend: str) -> Work:
    """Everything that the passes of a benchmark's case give, made anew from the same random numbers."""
    torch.manual_seed(0)
    problem = case.build(DEVICE, case.dtype, **case.shape)

    def work() -> list[Tensor]:
        out: list[Tensor] = []
        for run in problem.passes.values():
            result = run(backend)
            out += [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]
        return out

    return work


def bits(tensors: list[Tensor]) -> list[Tensor]:
    """Copies as bytes: NaNs compare too."""
    return [x.detach().contiguous().view(torch.uint8).clone() for x in tensors]


def assert_repeats(work: Callable[[], object], expected: list[Tensor], result: Work) -> None:
    for run in range(RUNS):
        work()
        for i, (got, want) in enumerate(zip(bits(result()), expected, strict=True)):
            assert torch.equal(got, want), f"run {run}, tensor {i}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("case", "backend"), ENGINES)
def test_scans_repeat_to_the_bit(case: str, backend: str, dtype: torch.dtype) -> None:
    """Called twenty times, and replayed twenty times from a graph."""
    need(backend, dtype)
    work = scan_work(case, backend, dtype)
    expected = bits(work())
    out: list[Tensor] = []

    def again() -> None:
        out[:] = work()

    assert_repeats(again, expected, lambda: out)
    captured = capture(work)
    assert_repeats(captured.replay, expected, lambda: captured.result)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(("op", "backend"), OPS)
def test_ops_repeat_to_the_bit(op: str, backend: str) -> None:
    """At the largest size of the benchmark; an op that changes its inputs begins anew every time, and has no graph."""
    case = cases_of(op)[-1]
    need(backend, case.dtype)
    work = op_work(case, backend)
    expected, second = bits(work()), bits(work())
    out: list[Tensor] = []

    def again() -> None:
        out[:] = op_work(case, backend)()

    assert_repeats(again, expected, lambda: out)
    if not all(torch.equal(x, y) for x, y in zip(expected, second, strict=True)):
        return
    captured = capture(work)
    assert_repeats(captured.replay, expected, lambda: captured.result)  # type: ignore[arg-type, return-value]

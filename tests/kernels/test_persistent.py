"""The persistent kernels with several programs alive at once, and each of their barriers: right, and needed."""

# ruff: noqa: E402
# mypy: allow-untyped-decorators
from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
import triton.language as tl
from apv_fast.kernels import interpreting, rssm_observe, stacked_observe
from apv_fast.kernels.parts import grid
from apv_fast.kernels.parts.scan_arguments import Device, Shape, make_shape
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from apv_fast.backend import BackendError
from apv_fast.recurrence.phases import ScanGrads, ScanInputs, ScanStart, ScanWeights, Trace, TraceGrads
from apv_fast.recurrence.plain import PlainScan
from apv_fast.recurrence.stacked import Link, Model, TwoScans
from apv_fast.types import Latent
from tests.support import cooperative

pytestmark = pytest.mark.skipif(not interpreting(), reason="a GPU runs these kernels as they are, in tests/ops")
PROGRAMS = 3
PHASES = 5
Problem = tuple[ScanWeights, ScanInputs, ScanStart, TraceGrads, Latent]
SIZES = {  # B, T, D, H, S, C: no size a multiple of its tile
    "categorical": (3, 3, 7, 9, 3, 3),
    "gaussian": (3, 3, 5, 6, 3, 0),
}


def make_problem(batch: int, length: int, deter: int, hidden: int, stoch: int, discrete: int) -> Problem:
    """A random recurrence in float64, some of whose sequences begin again on the way."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, of: int = 1) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / math.sqrt(of)

    width, stats = stoch * (discrete or 1), stoch * (discrete or 2)
    weights = ScanWeights(
        randn(hidden, width, of=width),
        *(randn(3 * deter, hidden + deter, of=hidden + deter), randn(3 * deter)),
        *(1 + randn(3 * deter, of=9), randn(3 * deter)),
        *(randn(hidden, deter, of=deter), randn(stats, hidden, of=hidden), randn(stats)),
    )
    inputs = ScanInputs(randn(batch, length, hidden), randn(batch, length, hidden))
    keep = torch.ones(batch, length, dtype=torch.bool)
    keep[1, 1] = keep[2, 0] = False
    start = ScanStart(keep, randn(batch, deter).tanh(), randn(batch, length, stoch, *([discrete] if discrete else [])))
    grads = TraceGrads(*(randn(batch, length, size) for size in (deter, width, stats)))
    return weights, inputs, start, grads, Latent(stoch, discrete)


def small_tiles(*arguments: Any) -> Shape:
    """Two or more tiles of everything, products in two slices and two rounds."""
    small = dict(BM=2, ROWS=1, UNITS=2, COLUMNS=4, GROUPS=2, BACK=8, GATHER_ROWS=2, GATHER_COLUMNS=8, SPLIT=2, DEPTH=2)
    return make_shape(*arguments)._replace(**small)


def poison(*scratch: Tensor) -> None:
    """What a program reads before it has been written is NaN, or the first row of weights."""
    for tensor in scratch:
        tensor.fill_(math.nan if tensor.is_floating_point() else 0)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, and memory that begins as NaN."""
    forward, backward = rssm_observe.forward_arguments, rssm_observe.backward_arguments

    def forward_arguments(*arguments: Any) -> Any:
        f = forward(*arguments)
        poison(f.deter, f.stats, f.x, f.parts, f.norm, f.y, f.hidden, f.sample, f.sums, f.joined[:, : f.x.shape[-1]])
        return f

    def backward_arguments(*arguments: Any) -> Any:
        g = backward(*arguments)
        poison(g.dx, g.dparts, g.dy, g.dstats, g.dscaled, g.direct, g.sums)
        return g

    monkeypatch.setattr(rssm_observe, "make_shape", small_tiles)
    monkeypatch.setattr(rssm_observe, "forward_arguments", forward_arguments)
    monkeypatch.setattr(rssm_observe, "backward_arguments", backward_arguments)


def run_cooperatively(monkeypatch: pytest.MonkeyPatch, programs: int, seed: int) -> None:
    """From here on, recurrences run with several programs alive, in the order of ``seed``."""

    def launch(whole: Any, phase: Any, rounds: Any, like: Tensor, arguments: tuple[Any, ...], *_: int) -> None:
        cooperative.launch(whole, programs, torch.zeros(1, dtype=torch.int32), *arguments, seed=seed)

    monkeypatch.setattr(rssm_observe, "launch", launch)


def hurry(monkeypatch: pytest.MonkeyPatch, module: Any, phase: int) -> None:
    """From here on, programs of ``module`` arrive at the barrier after ``phase``, but do not wait there."""
    whole = module.grid_barrier

    def hasty(counter: Any, arrivals: Any) -> None:
        number = int(arrivals.handle.data.item()) // PROGRAMS
        if (number - 1) % PHASES == phase - 1:
            tl.store(counter, tl.load(counter) + 1)
        else:
            whole(counter, arrivals)

    monkeypatch.setattr(module, "grid_barrier", hasty)


def goes_wrong(run: Callable[[], list[int]]) -> bool:
    """Whether a run makes wrong numbers, or none: Triton 3.9's interpreter raises where all of a maximum's are NaN."""
    try:
        return bool(run())
    except InterpreterError as error:
        if "All-NaN" not in str(error):
            raise
        return True


@functools.cache
def expected(name: str) -> tuple[Problem, Trace, ScanGrads]:
    """A problem, and what the plain recurrence makes of it."""
    problem = make_problem(*SIZES[name])
    weights, inputs, start, grads, latent = problem
    trace = PlainScan().forward(weights, inputs, start, latent)
    return problem, trace, PlainScan().backward(weights, start, trace, grads, latent)


def forward(problem: Problem) -> Trace:
    weights, inputs, start, _, latent = problem
    return rssm_observe.TritonScan().forward(weights, inputs, start, latent)


def backward(problem: Problem, trace: Trace) -> ScanGrads:
    weights, _, start, grads, latent = problem
    return rssm_observe.TritonScan().backward(weights, start, trace, grads, latent)


def wrong(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> list[int]:
    """Numbers of the tensors that differ by more than rounding."""
    return [i for i, (a, b) in enumerate(zip(got, want, strict=True)) if not torch.dist(a, b) <= 1e-12 * b.norm()]


@pytest.mark.thorough
@pytest.mark.parametrize(("programs", "seed"), [(3, 0), (2, 1), (5, 2)])
@pytest.mark.parametrize("name", SIZES)
def test_programs_share_the_work(monkeypatch: pytest.MonkeyPatch, name: str, programs: int, seed: int) -> None:
    run_cooperatively(monkeypatch, programs, seed)
    problem, trace, grads = expected(name)
    assert not wrong(forward(problem), trace)
    assert not wrong(backward(problem, trace), grads)


@pytest.mark.parametrize("name", SIZES)
def test_products_by_hand(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As a GPU multiplies float64."""
    monkeypatch.setattr(
        rssm_observe, "make_shape", lambda *arguments: small_tiles(*arguments)._replace(PRECISION="fma")
    )
    problem, trace, grads = expected(name)
    assert not wrong(forward(problem), trace)
    assert not wrong(backward(problem, trace), grads)


def test_any_order_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, trace, _ = expected("categorical")
    results = []
    for programs, seed in ((3, 3), (4, 4)):
        run_cooperatively(monkeypatch, programs, seed)
        results.append((*forward(problem), *backward(problem, trace)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("phase", range(1, PHASES + 1))
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_barrier_is_needed(monkeypatch: pytest.MonkeyPatch, direction: str, phase: int) -> None:
    """Programs that do not wait after one phase get it wrong in one of a few orders."""
    hurry(monkeypatch, rssm_observe, phase)
    problem, trace, grads = expected("categorical")

    def bad(seed: int) -> list[int]:
        run_cooperatively(monkeypatch, PROGRAMS, seed)
        return wrong(forward(problem), trace) if direction == "forward" else wrong(backward(problem, trace), grads)

    assert any(goes_wrong(functools.partial(bad, seed)) for seed in range(4))


@pytest.mark.parametrize("name", SIZES)
def test_a_launch_a_phase(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The same with the launches as barriers, and more programs than one."""
    monkeypatch.setenv(grid.ENVIRONMENT_VARIABLE, "phases")
    monkeypatch.setattr(rssm_observe, "device_of", lambda index: Device(PROGRAMS, 2**20, True))
    problem, trace, grads = expected(name)
    assert not wrong(forward(problem), trace)
    assert not wrong(backward(problem, trace), grads)


@pytest.mark.parametrize("discrete", [3, 0], ids=["categorical", "gaussian"])
def test_many_rows(monkeypatch: pytest.MonkeyPatch, discrete: int) -> None:
    """Enough that warps share the rows of a product, not its sum."""
    monkeypatch.setattr(
        rssm_observe, "make_shape", lambda *arguments: make_shape(*arguments)._replace(BM=64, ROWS=16, DEPTH=2)
    )
    problem = make_problem(67, 2, 5, 6, 2, discrete)
    weights, inputs, start, grads, latent = problem
    trace = PlainScan().forward(weights, inputs, start, latent)
    assert not wrong(forward(problem), trace)
    assert not wrong(backward(problem, trace), PlainScan().backward(weights, start, trace, grads, latent))


class Stack:
    """A lower and an upper model of different sizes, and what two scans make of them."""

    def __init__(self, lower: tuple[int, ...], upper: tuple[int, ...]) -> None:
        below, above = make_problem(*lower), make_problem(*upper)
        self.models = Model(below[0], below[2], below[4]), Model(above[0], above[2], above[4])
        self.inputs, self.grads = (below[1], above[1]), (below[3], above[3])
        generator = torch.Generator().manual_seed(1)
        hidden, widths = upper[3], (lower[4] * (lower[5] or 1), lower[2])
        stoch, deter = (torch.randn(hidden, n, generator=generator, dtype=torch.float64) / n**0.5 for n in widths)
        self.link = Link(stoch, deter)
        plain = TwoScans(PlainScan())
        self.traces = plain.forward(*self.models, self.link, self.inputs)
        self.grad_in = plain.backward(*self.models, self.link, self.traces, self.grads)

    def wrong(self, direction: str) -> list[int]:
        """Numbers of the tensors that the wavefront gets wrong, of both models."""
        core = stacked_observe.Wavefront()
        if direction == "forward":
            got = core.forward(*self.models, self.link, self.inputs)
            return [i for pair in zip(got, self.traces, strict=True) for i in wrong(*pair)]
        grad_in = core.backward(*self.models, self.link, self.traces, self.grads)
        return [i for pair in zip(grad_in, self.grad_in, strict=True) for i in wrong(*pair)]


@functools.cache
def stack(name: str) -> Stack:
    lower, upper = {
        "categorical": ((3, 2, 5, 6, 3, 3), (3, 2, 4, 5, 2, 4)),
        "gaussian": ((3, 2, 5, 6, 3, 0), (3, 2, 4, 5, 2, 0)),
        "equal": ((3, 2, 8, 8, 2, 4), (3, 2, 8, 8, 2, 4)),  # as in production: whole tiles, and one function for both
    }[name]
    return Stack(lower, upper)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", ["categorical", "gaussian", "equal"])
def test_the_wavefront_is_two_scans(monkeypatch: pytest.MonkeyPatch, name: str, direction: str) -> None:
    run_cooperatively(monkeypatch, PROGRAMS, seed=5)
    assert not stack(name).wrong(direction)


def test_the_wavefront_a_launch_a_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(grid.ENVIRONMENT_VARIABLE, "phases")
    monkeypatch.setattr(rssm_observe, "device_of", lambda index: Device(PROGRAMS, 2**20, True))
    assert not stack("categorical").wrong("forward") + stack("categorical").wrong("backward")


@pytest.mark.parametrize("phase", range(1, PHASES + 1))
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_barrier_of_the_wavefront_is_needed(monkeypatch: pytest.MonkeyPatch, direction: str, phase: int) -> None:
    hurry(monkeypatch, stacked_observe, phase)

    def bad(seed: int) -> list[int]:
        run_cooperatively(monkeypatch, PROGRAMS, seed)
        return stack("categorical").wrong(direction)

    assert any(goes_wrong(functools.partial(bad, seed)) for seed in range(4))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_barrier_lies_between_any_two_phases(monkeypatch: pytest.MonkeyPatch, direction: str) -> None:
    """One after the other they use the same shared memory; within a round no grid barrier parts the two models'."""
    events: list[str] = []
    phase = getattr(stacked_observe, f"{direction}_phase")

    def recorded(*arguments: Any) -> None:
        events.append("phase")
        phase(*arguments)

    monkeypatch.setattr(stacked_observe, f"{direction}_phase", recorded)
    builder = type(interpreter.interpreter_builder)
    monkeypatch.setattr(builder, "create_barrier", lambda self: events.append("barrier"))
    assert not stack("equal").wrong(direction)
    assert events.count("phase") == PHASES * 2 * 2
    assert ("phase", "phase") not in itertools.pairwise(events)


@triton.jit
def _meet(counter: Any, seen: Any, LATE: tl.constexpr) -> None:
    program, programs = tl.program_id(0), tl.num_programs(0)
    for number in range(1, 4):
        tl.store(seen + program, number)
        if program != LATE:
            grid.grid_barrier(counter, programs * number)
            everyone = tl.load(seen + tl.arange(0, 4))
            tl.store(seen + 4 + program, tl.min(everyone, 0))
            grid.grid_barrier(counter, programs * number)


def test_a_program_that_never_comes_is_noticed() -> None:
    counter, seen = torch.zeros(1, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    with pytest.raises(cooperative.Deadlock, match="cannot open"):
        cooperative.launch(_meet, 4, counter, seen, LATE=2)


def test_drivers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    monkeypatch.delenv(grid.ENVIRONMENT_VARIABLE, raising=False)
    assert grid.scan_driver(device)[0] == "persistent"
    monkeypatch.setenv(grid.ENVIRONMENT_VARIABLE, "phases")
    assert grid.scan_driver(device) == ("phases", "APV_FAST_SCAN asks for it")
    monkeypatch.setenv(grid.ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(BackendError, match="APV_FAST_SCAN is 'fast'; it must be one of: auto, persistent, phases"):
        grid.scan_driver(device)


def test_without_cooperative_launches_phases_are_launched(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The next best driver is chosen and logged once; the impossible one, asked for, is an error."""
    monkeypatch.setattr(grid, "_obstacle", lambda device: "its driver is old")
    monkeypatch.delenv(grid.ENVIRONMENT_VARIABLE, raising=False)
    device = torch.device("cuda", 7)
    assert grid.scan_driver(device) == grid.scan_driver(device) == ("phases", "its driver is old")
    assert [record.getMessage() for record in caplog.records] == [
        "the RSSM scan launches every phase on its own, which is slower: its driver is old"
    ]
    monkeypatch.setenv(grid.ENVIRONMENT_VARIABLE, "persistent")
    with pytest.raises(BackendError, match="persistent cannot run here: its driver is old; 'phases' or 'auto' can"):
        grid.scan_driver(device)
    grid._reason.cache_clear()

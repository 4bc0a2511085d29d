"""The registry of cases, for ``python -m bench`` and ``python -m bench.device``; who competes in those of the first.

A case is one op (or whole update) at one size and dtype. The modules of ``bench/cases/`` register them with
:func:`case`; what they decorate makes the inputs and knows the contestants that are no backend.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib
import itertools
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from apv_fast.backend import IMPLEMENTATIONS, PROBES, BackendError, choose, probe, resolve, use_backend

REFERENCE = "reference"
COMPILED = "torch.compile"  # of the reference
EAGER_FP32 = "eager fp32"  # the reference in float32, beside a case of bfloat16
AUTOCAST = "autocast"  # the same under torch.autocast: PyTorch's own way to bfloat16
WIDER = (EAGER_FP32, AUTOCAST)
PLAIN = "torch"  # as one would write it in PyTorch, where the reference is written otherwise
PYTORCH = (REFERENCE, AUTOCAST, COMPILED, PLAIN)  # in the dtype of the case: what ours is held against
OURS = ("cpu", "auto")  # of a machine without a GPU
FORWARD, FORWARD_BACKWARD = "forward", "forward_backward"
COLD, WARM = "cold", "warm"  # what a GPU's L2 holds before a run: nothing of the work, or all of it
FP32, BF16, TF32 = torch.float32, torch.bfloat16, "tf32"

Run = Callable[[str], object]  # does the work once, on the contestant of that name
Work = Callable[[], object]  # does it once
Passes = Mapping[str, Work]  # FORWARD, FORWARD_BACKWARD -> does it once


@dataclass(frozen=True)
class Other:
    """A contestant that is no backend: a rival, or our kernels used in another way."""

    prepare: Callable[[], Passes]  # may take long, or raise what it lacks
    slow: bool = False  # takes minutes to compile: left out unless --slow
    graph: bool = True  # whether bench.device records its passes as CUDA graphs


@dataclass(frozen=True)
class Problem:
    """A case with its inputs made: what one timing calls."""

    passes: Mapping[str, Run]  # FORWARD is without autograd; FORWARD_BACKWARD gives the gradients, or is a whole update
    others: Mapping[str, Other] = field(default_factory=dict)
    graph: bool = True  # whether bench.device records the backends' passes; an update records itself


Build = Callable[..., Problem]  # (device, dtype, **shape) -> Problem


@dataclass(frozen=True)
class OnDevice:
    """How ``python -m bench.device`` times a case."""

    seconds: float = 60.0  # a limit for all of it, compilation included
    caches: tuple[str, ...] = (COLD, WARM)  # both for a small op: in an update its inputs have just been written


@dataclass(frozen=True, eq=False)
class Case:
    """One op (or whole update) at one size and dtype."""

    op: str
    shape: Mapping[str, int]
    dtype: torch.dtype
    build: Build
    uses: tuple[str, ...]  # rows of apv_fast.backend.IMPLEMENTATIONS that it exercises
    slow: bool = False  # left out unless --slow
    wider: tuple[str, ...] = ()  # of WIDER, in bfloat16: contestants whose weights and inputs are float32
    memory: bool = False  # whether the peak of its memory is measured too
    bench: bool = True  # whether python -m bench times it
    device: OnDevice | None = None  # whether and how python -m bench.device times it
    tf32: bool = False  # whether products of float32 may be in tf32, on a GPU

    @property
    def dtype_name(self) -> str:
        """Without "torch."; "tf32" where products may be that."""
        return TF32 if self.tf32 else str(self.dtype).removeprefix("torch.")

    @property
    def shape_name(self) -> str:
        """For example "H=15 N=400"."""
        return " ".join(f"{name}={size}" for name, size in self.shape.items())

    @property
    def name(self) -> str:
        """What ``--only`` is matched with."""
        return f"{self.op} {self.shape_name} {self.dtype_name}"


CASES: list[Case] = []


def case(
    op: str,
    shapes: Sequence[Mapping[str, int]],
    *,
    dtypes: Sequence[torch.dtype | str] = (FP32,),
    uses: Sequence[str] | None = None,
    slow: bool = False,
    wider: Sequence[str] = (),
    memory: bool = False,
    bench: bool = True,
    device: OnDevice | None = None,
) -> Callable[[Build], Build]:
    """Register the decorated function as ``op`` at every shape and dtype; ``uses`` is the op itself unless given."""

    def register(build: Build) -> Build:
        used = (op,) if uses is None else tuple(uses)
        for shape, dtype in itertools.product(shapes, dtypes):
            kind = dtype if isinstance(dtype, torch.dtype) else FP32
            more = tuple(wider) if kind == BF16 else ()
            CASES.append(Case(op, shape, kind, build, used, slow, more, memory, bench, device, dtype == TF32))
        return build

    return register


def load() -> list[Case]:
    """All cases, of both commands."""
    package = importlib.import_module("bench.cases")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"bench.cases.{module.name}")
    return CASES


def select(pattern: str = "", *, slow: bool = False) -> list[Case]:
    """Cases of ``python -m bench`` whose name contains ``pattern``, in which ``*`` and ``?`` match anything.

    ``slow``: also those that take minutes.
    """
    cases = [case for case in load() if case.bench and (slow or not case.slow)]
    return [case for case in cases if fnmatch.fnmatchcase(case.name, f"*{pattern}*")]


def both_passes(
    forward: Callable[..., Sequence[Tensor]], leaves: Sequence[Tensor], cotangents: Sequence[Tensor] | None = None
) -> dict[str, Callable[..., object]]:
    """A function without autograd, and the gradients with respect to ``leaves``; both take what ``forward`` takes.

    ``cotangents``, the gradients of its outputs, are random numbers unless given.
    """
    if cotangents is None:
        with torch.no_grad():
            cotangents = [torch.randn_like(output) for output in forward()]

    def without_gradients(*names: str) -> object:
        with torch.no_grad():
            return forward(*names)

    def with_gradients(*names: str) -> object:
        return torch.autograd.grad(list(forward(*names)), list(leaves), cotangents)

    return {FORWARD: without_gradients, FORWARD_BACKWARD: with_gradients}


def differentiable(
    forward: Callable[[str], Sequence[Tensor]], leaves: Sequence[Tensor], *, slow_to_compile: bool = False
) -> Problem:
    """A problem from a function of the backend: forward, and the gradients of its outputs with respect to ``leaves``.

    ``torch.compile`` of the reference is a rival; with ``slow_to_compile``, as a whole scan is, only on --slow.
    """
    with torch.no_grad():
        cotangents = [torch.randn_like(output) for output in forward(REFERENCE)]

    def compiled() -> Passes:
        function = torch.compile(forward, dynamic=False)
        return both_passes(functools.partial(function, REFERENCE), leaves, cotangents)

    return Problem(both_passes(forward, leaves, cotangents), {COMPILED: Other(compiled, slow=slow_to_compile)})


def wider(case: Case, device: torch.device) -> dict[str, Other]:
    """The contestants ``case.wider``: the reference of the same case with float32 inputs and weights."""

    @functools.cache
    def passes() -> Mapping[str, Run]:
        return case.build(device, FP32, **case.shape).passes

    def eager(run: Run) -> object:
        return run(REFERENCE)

    def autocast(run: Run) -> object:
        with torch.autocast(device.type, case.dtype):
            return run(REFERENCE)

    def prepare(way: Callable[[Run], object]) -> Passes:
        return {passed: functools.partial(way, run) for passed, run in passes().items()}

    ways = {EAGER_FP32: eager, AUTOCAST: autocast}
    return {name: Other(functools.partial(prepare, ways[name])) for name in case.wider}


def contestants(case: Case, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """Backends that run the case on this machine, the reference first, and why each of the others does not.

    A case of several ops runs on "auto" where that is more than the reference, and on each backend that has them all.
    """
    tensor = torch.empty(0, dtype=case.dtype, device=device)
    names, left_out = [REFERENCE], {}
    with use_backend("auto"):
        picked = {choose(op, tensor) for op in case.uses}
    if len(case.uses) > 1 and picked != {REFERENCE}:
        names.append("auto")
    for backend in PROBES:
        if backend == REFERENCE or not all(backend in IMPLEMENTATIONS[op] for op in case.uses):
            continue
        if "auto" in names and picked == {backend}:
            continue  # the same twice
        if reason := _obstacle(case, backend, tensor):
            left_out[backend] = reason
        else:
            names.append(backend)
    return names, left_out


def _obstacle(case: Case, backend: str, tensor: Tensor) -> str | None:
    """Why ``backend`` has no row, or None."""
    if not probe(backend).available:
        return probe(backend).reason
    if probe(backend).isa == "interpreter":
        return "TRITON_INTERPRET is set, and the time of the interpreter is not that of the kernel: unset it"
    try:
        for op in case.uses:
            resolve(op, tensor, backend)
    except BackendError as error:
        return str(error)
    return None

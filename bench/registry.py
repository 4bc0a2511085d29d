"""The registry of cases, and which contestants a case has on this machine."""

from __future__ import annotations

import fnmatch
import functools
import importlib
import itertools
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apv_fast.backend import IMPLEMENTATIONS, PROBES, BackendError, choose, probe, resolve, use_backend

REFERENCE = "reference"
COMPILED = "torch.compile"  # of the reference
EAGER_FP32 = "eager fp32"  # the reference in float32, beside a case of bfloat16
AUTOCAST = "autocast"  # the same under torch.autocast: PyTorch's own way to bfloat16
WIDER = (EAGER_FP32, AUTOCAST)
OURS = ("cpu", "auto")  # of a machine without a GPU
FORWARD, FORWARD_BACKWARD = "forward", "forward_backward"

Run = Callable[[str], object]  # does the work once, on the contestant of that name


@dataclass(frozen=True)
class Problem:
    """A case with its inputs made: what one timing calls."""

    passes: Mapping[str, Run]  # FORWARD is without autograd; FORWARD_BACKWARD gives the gradients, or is a whole update
    rivals: tuple[str, ...] = ()  # contestants that are no backend: COMPILED, or a name that the passes know
    slow_rivals: tuple[str, ...] = ()  # the same, left out unless --slow


Build = Callable[..., Problem]  # (device, dtype, **shape) -> Problem


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

    @property
    def dtype_name(self) -> str:
        """Without "torch."."""
        return str(self.dtype).removeprefix("torch.")

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
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    uses: Sequence[str] | None = None,
    slow: bool = False,
    wider: Sequence[str] = (),
    memory: bool = False,
) -> Callable[[Build], Build]:
    """Register the decorated function as ``op`` at every shape and dtype; ``uses`` is the op itself unless given."""

    def register(build: Build) -> Build:
        used = (op,) if uses is None else tuple(uses)
        for shape, dtype in itertools.product(shapes, dtypes):
            more = tuple(wider) if dtype == torch.bfloat16 else ()
            CASES.append(Case(op, shape, dtype, build, used, slow, more, memory))
        return build

    return register


def select(pattern: str = "", *, slow: bool = False) -> list[Case]:
    """Cases whose name contains ``pattern`` (``*`` and ``?`` match anything), slow ones only if asked for."""
    package = importlib.import_module("bench.cases")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"bench.cases.{module.name}")
    return [case for case in CASES if (slow or not case.slow) and fnmatch.fnmatchcase(case.name, f"*{pattern}*")]


def differentiable(
    forward: Callable[[str], Sequence[Tensor]], leaves: Sequence[Tensor], *, slow_to_compile: bool = False
) -> Problem:
    """A problem from a function of the backend: forward, and the gradients of its outputs with respect to ``leaves``.

    ``torch.compile`` of the reference is a rival; with ``slow_to_compile``, as a whole scan is, only on --slow.
    """
    compiled = torch.compile(forward, dynamic=False)

    def run(name: str) -> list[Tensor]:
        return list(compiled(REFERENCE) if name == COMPILED else forward(name))

    with torch.no_grad():
        cotangents = [torch.randn_like(output) for output in run(REFERENCE)]

    def without_gradients(name: str) -> object:
        with torch.no_grad():
            return run(name)

    def with_gradients(name: str) -> object:
        return torch.autograd.grad(run(name), list(leaves), cotangents)

    passes = {FORWARD: without_gradients, FORWARD_BACKWARD: with_gradients}
    return Problem(passes, slow_rivals=(COMPILED,)) if slow_to_compile else Problem(passes, rivals=(COMPILED,))


def run_wider(case: Case, device: torch.device) -> Mapping[str, Mapping[str, Run]]:
    """The passes of ``case.wider``'s contestants, by their names: of the same case with float32 inputs and weights."""
    if not case.wider:
        return {}
    passes = case.build(device, torch.float32, **case.shape).passes

    def eager(run: Run, name: str) -> object:
        return run(REFERENCE)

    def autocast(run: Run, name: str) -> object:
        with torch.autocast(device.type, case.dtype):
            return run(REFERENCE)

    ways = {EAGER_FP32: eager, AUTOCAST: autocast}
    return {name: {key: functools.partial(ways[name], run) for key, run in passes.items()} for name in case.wider}


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

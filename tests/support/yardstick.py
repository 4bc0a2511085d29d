"""How exact a dtype lets PyTorch be, the same on every machine: what the errors of all backends are measured by.

A product of the local BLAS is no yardstick: MKL's error varies by a factor of two and more between CPUs. So the
reference runs with its products written out here: every sum in blocks of :data:`TERMS` terms, one after the other in
float32, then block after block. Half precision is summed in float64 and rounded once; float64 keeps MKL's sums in a
block. On CPUs of AMD, where MKL's own sums are long ones, PyTorch as it is has to be matched too.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from apv_fast.backend import probe

TERMS, TERMS_OF_CONVOLUTION = 64, 256  # a block's; over pixels, where PyTorch's own sums are long ones
PROBLEMS = (1, 4, 16)  # see judge
EXACT = 1e-12
TOGETHER = 2**16  # sums at a time, so that they stay in the second-level cache
# Other random numbers in all tests whose bound is statistical, and other examples of hypothesis; see tests/matrix.py.
VARIATION = int(os.environ.get("APV_FAST_TEST_VARIATION", "0"))
aten = torch.ops.aten
R = TypeVar("R")


_number = 0  # see another


def seed_of(seed: int) -> int:
    """``seed``, or another one in each variation."""
    return seed + 1_000_003 * VARIATION + 7919 * _number


@contextlib.contextmanager
def another(number: int) -> Iterator[None]:
    """The ``number``-th set of random numbers from :func:`seed_of`, for :func:`judge`; the 0th is everyone's."""
    global _number
    _number = number
    try:
        yield
    finally:
        _number = 0


def product(a: Tensor, b: Tensor, terms: int = TERMS) -> Tensor:
    """``a [M, K] @ b [K, N]`` of one dtype, which is the result's; see the module."""
    (m, k), n = a.shape, b.shape[1]
    if a.dtype != torch.float32:
        wide = a.new_zeros(m, n, dtype=torch.float64)
        for first in range(0, k, terms):
            wide += a[:, first : first + terms].double() @ b[first : first + terms].double()
        return wide.to(a.dtype)
    blocks = max(1, -(-k // terms))
    left = F.pad(a, (0, blocks * terms - k)).view(m, blocks, terms).permute(2, 1, 0)[..., None]
    right = F.pad(b, (0, 0, 0, blocks * terms - k)).view(blocks, terms, 1, n).transpose(0, 1)
    rows = max(1, TOGETHER // (blocks * n)) if n else 1
    out = a.new_empty(m, n)
    for first in range(0, m, rows):
        part = left[:, :, first : first + rows]
        sums = a.new_zeros(blocks, part.shape[2], n)
        term = torch.empty_like(sums)
        for i in range(min(k, terms)):
            sums += torch.mul(part[i], right[i], out=term)
        total = sums[0]
        for block in sums[1:]:
            total = total + block
        out[first : first + rows] = total
    return out


class Convolution:
    """Products of the weight with the pixels below it, and their gradients; no dilation, no groups."""

    def __init__(self, weight: Tensor, stride: Sequence[int], padding: Sequence[int], transposed: bool) -> None:
        self.weight, self.transposed = weight, transposed
        self.kernel, self.stride, self.padding = tuple(weight.shape[2:]), tuple(stride), tuple(padding)

    def forward(self, x: Tensor) -> Tensor:
        """The result without bias."""
        return self._spread(x, self._grown(x)) if self.transposed else self._gather(x)

    def backward(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of input, weight and bias."""
        small, large = (x, grad) if self.transposed else (grad, x)
        of_weight = self._product(self._rows(small).T, self._rows(self._windows(large)))
        of_x = self._gather(grad) if self.transposed else self._spread(grad, x.shape[2:])
        rows = self._rows(grad)
        of_bias = self._product(rows.new_ones(1, len(rows)), rows)
        return of_x, of_weight.view_as(self.weight), of_bias[0]

    @staticmethod
    def _product(a: Tensor, b: Tensor) -> Tensor:
        return product(a, b, TERMS_OF_CONVOLUTION)

    @staticmethod
    def _rows(x: Tensor) -> Tensor:
        """Channels behind everything else, ``[N·pixels, C]``."""
        return x.flatten(2).transpose(1, 2).flatten(0, 1)

    def _gather(self, x: Tensor) -> Tensor:
        """From the large image to the small one."""
        sizes = zip(x.shape[2:], self.kernel, self.stride, self.padding, strict=True)
        size = [(s + 2 * p - k) // d + 1 for s, k, d, p in sizes]
        out = self._product(self._rows(self._windows(x)), self.weight.flatten(1).T)
        return out.view(len(x), -1, len(self.weight)).transpose(1, 2).unflatten(2, size)

    def _spread(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """From the small image to the large one."""
        out = self._product(self._rows(x), self.weight.flatten(1)).view(len(x), x.shape[2:].numel(), -1)
        return F.fold(out.transpose(1, 2), tuple(size), self.kernel, stride=self.stride, padding=self.padding)

    def _grown(self, x: Tensor) -> list[int]:
        sizes = zip(x.shape[2:], self.kernel, self.stride, self.padding, strict=True)
        return [(s - 1) * d + k - 2 * p for s, k, d, p in sizes]

    def _windows(self, x: Tensor) -> Tensor:
        return F.unfold(x, self.kernel, stride=self.stride, padding=self.padding)


class PlainSums(TorchDispatchMode):
    """PyTorch with the products of this module in place of its own; another kind of product is an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = func.overloadpacket
        if kind is aten.mm:
            return product(*args)
        if kind is aten.bmm:
            return torch.stack([product(a, b) for a, b in zip(*args, strict=True)])
        if kind is aten.addmm:
            bias, a, b = (_wide(x) for x in args)
            return (bias + product(a, b)).to(args[1].dtype)
        if kind is aten.convolution:
            x, weight, bias, stride, padding, _, transposed, _, _ = args
            out = Convolution(_wide(weight), stride, padding, transposed).forward(_wide(x))
            return (out if bias is None else out + _wide(bias).view(-1, 1, 1)).to(x.dtype)
        if kind is aten.convolution_backward:
            grad, x, weight, _, stride, padding, _, transposed, _, _, mask = args
            grads = Convolution(_wide(weight), stride, padding, transposed).backward(_wide(grad), _wide(x))
            return tuple(g.to(x.dtype) if wanted else None for g, wanted in zip(grads, mask, strict=True))
        if any(word in str(kind) for word in ("matmul", "linear", "conv", "baddbmm", "addmv", "aten.mv", "aten.dot")):
            raise NotImplementedError(f"{func} is a product of the local BLAS; write it out here")
        return func(*args, **(kwargs or {}))


def _wide(x: Tensor) -> Tensor:
    """Half precision as float64: it is rounded once, after what is added to a product."""
    return x if x.dtype == torch.float32 else x.double()


@functools.cache
def _customary() -> bool:
    """Whether this is a CPU on which PyTorch's own sums are no more exact than plain ones."""
    info = Path("/proc/cpuinfo")
    return info.exists() and "AuthenticAMD" in info.read_text()


def yardsticks(run: Callable[[], R], backend: str = "cpu") -> list[R]:
    """The results of ``run``, PyTorch alone, that the errors of ``backend`` are compared with: the least error counts.

    On a GPU that is PyTorch as it is. So it is for the reference, which has nothing else to be compared with.
    """
    if backend == "reference" or probe(backend).devices[-1] != "cpu":
        return [run()]
    with PlainSums():  # type: ignore[no-untyped-call]
        results = [run()]
    return [*results, run()] if _customary() else results


def least(errors: Iterable[dict[str, float]]) -> dict[str, float]:
    """Of each tensor's errors."""
    first, *others = errors
    return {name: min(error, *(other[name] for other in others)) for name, error in first.items()} if others else first


def judge(
    measure: Callable[[int], dict[str, tuple[float, float]]],
    dtype: torch.dtype,
    *,
    exact: bool = True,
    floors: Mapping[str, float] | None = None,
    vanishing: bool = False,
) -> None:
    """Hold relative errors to twice PyTorch's own; in float64 (``exact``) to 1e-12.

    PyTorch's own counts as half a rounding of ``dtype`` at least, or as what ``floors`` has for the name.

    ``measure`` gives (the backend's, PyTorch's) by name for the problem of a seed. Where one problem is outside of the
    bound, the root of the mean square over four decides, and then over sixteen: of a few roundings one is luck. With
    sizes of 1 a tensor may all but vanish (``vanishing``): relative errors then have no mean square to speak of, and
    the median of the sixteen decides; in float64 only in variations.

    Raises:
        AssertionError: which are outside.
    """
    errors: list[dict[str, tuple[float, float]]] = []

    def outside(typical: Callable[[list[float]], float]) -> dict[str, str]:
        names = {}
        for name in errors[0]:
            error, own = (typical([one[name][side] for one in errors]) for side in (0, 1))
            floor = (floors or {}).get(name, torch.finfo(dtype).eps / 2)
            if not error <= (EXACT if exact and dtype == torch.float64 else 2 * max(own, floor)):
                names[name] = f"error {error:.2e}, PyTorch {own:.2e}"
        return names

    for count in PROBLEMS:
        errors += [measure(seed) for seed in range(len(errors), count)]
        if not (names := outside(_root_mean_square)):
            return
    if vanishing and (VARIATION or dtype != torch.float64) and not outside(statistics.median):
        return
    raise AssertionError(names)


def _root_mean_square(numbers: list[float]) -> float:
    return math.sqrt(statistics.fmean(x**2 for x in numbers))

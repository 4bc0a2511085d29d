"""Bad and empty input to every op that has a CPU kernel: the reference's answer, or an error that names the argument.

Each problem of :mod:`tests.support.cpu_problems` is spoilt one tensor at a time. Both backends must then raise the same
error, one of :mod:`apv_fast.ops` and not of a kernel, or return the same. All of it runs in another process, so that a
crash is a failure of one test.
"""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch
from torch import Tensor

from apv_fast.backend import probe
from tests.support.cpu_problems import NAMES, Results, problem
from tests.support.rssm_cases import Tensors

if not probe("cpu").available:
    pytest.skip(f"cpu: {probe('cpu').reason}", allow_module_level=True)

# What is no argument of the op. Adam's gradients are checked by PyTorch where they are set.
NOT_ARGUMENTS = ("cotangent", "like")
# Errors of those who come before and after the op: the choice of an engine, PyTorch for a parameter's gradient or a
# cotangent of the wrong size, and the problem of rssm_step for a sequence without a first step.
BY_OTHERS = (
    "BackendError: backend|RuntimeError: (attempting to assign a gradient|Mismatch in shape: grad_output)|"
    "IndexError: (too many indices|index 0)"
)
Spoil = Callable[[Tensor], Tensor]


def _with(value: float) -> Spoil:
    def spoil(x: Tensor) -> Tensor:
        x = x.clone()
        x.view(-1)[x.numel() // 2] = value
        return x

    return spoil


def _strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


def spoilt(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What ``x`` is not meant to be, by name; then what it may be."""
    yield "one dimension more", x[None]
    yield "on another device", x.to("meta")
    if x.dim() > 0:
        yield "one dimension less", x[0]
    for dim in range(x.dim()):
        yield f"dimension {dim} one longer", torch.cat([x, x.narrow(dim, 0, 1)], dim)
        yield f"dimension {dim} one shorter", x.narrow(dim, 0, x.shape[dim] - 1)
        yield f"dimension {dim} empty", x.narrow(dim, 0, 0)
    yield "with gaps", _strided(x)
    if not x.is_floating_point():
        yield "floating", x.float()
        return
    yield "of integers", x.long()
    yield "of another floating dtype", x.double() if x.dtype == torch.float32 else x.float()
    yield "with a NaN", _with(torch.nan)(x)
    yield "with an infinity", _with(torch.inf)(x)


def answer(call: Callable[[Tensors, str], Results], tensors: Tensors, backend: str) -> Results | str:
    """Results, or the error."""
    try:
        return call(tensors, backend)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def difference(op: str, got: Results | str, expected: Results | str) -> str:
    """What is wrong with an answer; empty: nothing."""
    if isinstance(got, str) or isinstance(expected, str):
        errors = [x if isinstance(x, str) else "a result" for x in (got, expected)]
        if all(re.match(BY_OTHERS, error) for error in errors):
            return ""
        named = re.match(rf"(TypeError|ValueError): {op}: ", errors[0])
        return "" if named and errors[0] == errors[1] else f"got {errors[0]}; the reference {errors[1]}"
    for name, want in expected.items():
        x = got[name]
        if x.shape != want.shape or x.dtype != want.dtype:
            return f"{name} is {x.dtype} {tuple(x.shape)}; the reference's {want.dtype} {tuple(want.shape)}"
        if x.is_meta and want.is_meta:  # nothing reads this tensor
            continue
        both = x.isfinite() & want.isfinite()
        if not torch.allclose(x[both], want[both], rtol=1e-3, atol=1e-4):
            return f"{name} differs: {x[both].tolist()[:8]}; the reference's {want[both].tolist()[:8]}"
    finite = [all(x.is_meta or bool(x.isfinite().all()) for x in results.values()) for results in (got, expected)]
    return "" if finite[0] == finite[1] else f"all finite: {finite[0]}; the reference's: {finite[1]}"


# Dimensions that may be empty, as the tensors that have them (by the beginnings of their names) and where.
_BATCH = {"embed": 0, "is_first": 0, "action": 0, "deter": 0, "stoch": 0, "post_noise": 0, "prior_noise": 0}
_LOWER = {f"af.{name}": 0 for name in ("deter", "stoch", "post_noise", "prior_noise")}
_STEPS = {"embed": 1, "is_first": 1, "action": 1, "post_noise": 1, "prior_noise": 1}
EMPTY: dict[str, list[dict[str, int]]] = {
    "image_decoder": [{"x": 0, "cotangent": 0}],
    "image_encoder": [{"x": 0, "cotangent": 0}],
    "image_loss": [{"mean": dim, "image": dim} for dim in range(4)],
    "keras_adam": [{name: 0 for name in ("w0", "a0", "b0", "c0")}],
    "kl_balance": [{"0": dim, "1": dim} for dim in range(4)],
    "kl_balance_normal": [{name: dim for name in "0123"} for dim in range(3)],
    "knn_bonus": [{"query": 0}, {"keys": 0}, {"query": 1, "keys": 1}],
    "lambda_return": [
        {"reward": 0, "value": 0, "discount": 0},
        {"reward": 1, "value": 1, "discount": 1, "bootstrap": 0},
    ],
    "mlp": [{"x": 0, "cotangent": 0}, {"x": 1, "w0": 1}, {"w0": 0, "w1": 0, "w2": 1}],
    "normalize_image": [{"image": dim} for dim in range(4)],
    "rssm_imagine": [_BATCH, _STEPS],
    "rssm_observe": [_BATCH, _STEPS, {"action": 2}],
    "rssm_rollout": [{"deter": 0, "stoch": 0, "noise": 1, "action_noise": 1}, {"noise": 0, "action_noise": 0}],
    "rssm_step": [_BATCH, {"action": 2}],
    "stacked_observe": [_BATCH | _LOWER, _STEPS | {"af.post_noise": 1, "af.prior_noise": 1}, {"action": 2}],
    "video_bonus": [{"af_feat": 0}, {"af_feat": 2, "projection": 0}, {"projection": 1, "queue": 1}, {"queue": 0}],
}


def without(tensors: Tensors, dims: dict[str, int]) -> Tensors:
    """The tensors with no numbers along some dimensions."""
    return tensors | {name: tensors[name].detach().narrow(dim, 0, 0) for name, dim in dims.items() if name in tensors}


def variants(name: str, tensors: Tensors) -> Iterator[tuple[str, Tensors]]:
    """Spoilt versions of a problem's tensors by what was done."""
    for key, x in tensors.items():
        if key not in NOT_ARGUMENTS:
            yield from ((f"{key} {what}", tensors | {key: bad}) for what, bad in spoilt(x.detach()))
    for dims in EMPTY[name.split()[0]]:
        yield f"empty {dims}", without(tensors, dims)


def findings(name: str) -> dict[str, str]:
    """What is wrong with the problem's answers, by what was done to which tensor."""
    one, op = problem(name, torch.float32, large=False), name.split()[0]
    errors = {}
    for what, tensors in variants(name, one.tensors):
        answers = [answer(one.call, tensors, backend) for backend in ("cpu", "reference")]
        if wrong := difference(op, *answers):
            errors[what] = wrong
    return errors


def _leaf(x: Tensor, requires_grad: bool = True) -> Tensor:
    x.requires_grad = requires_grad and x.is_floating_point()
    return x


def prepare() -> None:
    """The process: problems make leaves of tensors, and integers must reach the op, too."""
    torch.set_num_threads(1)
    Tensor.requires_grad_ = _leaf  # type: ignore[assignment,method-assign]


class Process:
    """Another process, replaced when it has died."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), prepare)

    def findings(self, name: str) -> dict[str, str]:
        try:
            return self.pool.submit(findings, name).result(timeout=60)
        except BrokenProcessPool:
            self.start()
            raise


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    process = Process()
    yield process
    process.pool.shutdown()


@pytest.mark.parametrize("name", NAMES)
def test_bad_and_empty_input(name: str, process: Process) -> None:
    errors = process.findings(name)
    assert not errors, "\n".join(f"{key}: {wrong}" for key, wrong in errors.items())

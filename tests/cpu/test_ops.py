"""What every CPU kernel must do alike: all instruction sets, any number of threads, several callers, after a fork."""

from __future__ import annotations

import functools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from apv_fast.backend import probe
from tests.support import ROOT
from tests.support.cpu_problems import NAMES, OPS, PROBLEMS, Results, problem

if not probe("cpu").available:
    pytest.skip(f"cpu: {probe('cpu').reason}", allow_module_level=True)

from apv_fast import _C
from tests.support.yardstick import another, judge, yardsticks

DTYPES = [torch.float32, torch.bfloat16]
ISAS = _C.supported_isas()
every = pytest.mark.parametrize("name", NAMES)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
all_isas = pytest.mark.parametrize("isa", ISAS)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def assert_same(got: Results, expected: Results) -> None:
    """Bit for bit."""
    assert got.keys() == expected.keys()
    differing = [key for key, x in got.items() if not torch.equal(x, expected[key])]
    assert not differing, differing


def error(got: Results, exact: Results) -> float:
    """Root of the mean over the tensors of the squared relative error."""
    of = [(torch.dist(x.double(), exact[key].double()) / exact[key].double().norm()) ** 2 for key, x in got.items()]
    return float(torch.stack(of).nan_to_num(nan=0.0).mean().sqrt())  # 0/0: right


@functools.cache
def expected(name: str, dtype: torch.dtype, large: bool, seed: int = 0) -> tuple[Results, float]:
    """What is right, and the reference's error in this dtype, of one set of numbers."""
    with another(seed):
        one = problem(name, dtype, large=large)
    exact = one.exact()
    return exact, min(error(plain, exact) for plain in yardsticks(lambda: one.run("reference")))


def test_every_op_with_a_kernel_is_tested_here() -> None:
    assert set(OPS) <= PROBLEMS.keys()


@pytest.mark.statistical
@every
@all_dtypes
@all_isas
def test_every_instruction_set(name: str, dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most twice the reference's own error; small and odd, and several blocks."""
    monkeypatch.setenv("APV_FAST_CPU_ISA", isa)
    for large in (False, True):

        def measure(seed: int, large: bool = large) -> dict[str, tuple[float, float]]:
            exact, own = expected(name, dtype, large, seed)
            with another(seed):
                got = problem(name, dtype, large=large).run("cpu")
            return {name: (error(got, exact), own)}

        judge(measure, dtype)


@every
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("isa", [*ISAS, "amx"])
def test_any_number_of_threads(name: str, dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits; "amx": as on a CPU where PyTorch's products of half precision split their sums."""
    from apv_fast.cpu.parts import product

    if isa != "amx":
        monkeypatch.setenv("APV_FAST_CPU_ISA", isa)
    elif dtype == torch.bfloat16:
        monkeypatch.setattr(product, "_splits_sums", lambda: True)
    else:
        pytest.skip("only half precision is multiplied in another way")
    one = problem(name, dtype, large=True)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(one.run("cpu"))
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_in_pieces(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any shape: values, with and without a bias, and the same bits on any number of threads."""
    from apv_fast.cpu.parts import product

    monkeypatch.setattr(product, "_splits_sums", lambda: True)
    generator = torch.Generator().manual_seed(0)
    for m, k, n in ((1, 1, 1), (3, 0, 2), (0, 4, 3), (5, 95, 600), (600, 95, 5), (3, 130, 95), (130, 700, 129)):
        a, b, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((m, k), (k, n), (n,)))
        exact = a.double() @ b.double()
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((product.product(a, b), product.dense(a, b.T, bias, elu=False)))
        for other in results:
            assert all(torch.equal(x, y) for x, y in zip(other, results[0], strict=True))
        for out, right in zip(results[0], (exact, exact + bias.double()), strict=True):
            assert out.is_contiguous() and out.dtype == dtype
            assert torch.dist(out.double(), right) <= torch.finfo(dtype).eps * right.norm()


def test_an_error_in_one_share_is_raised() -> None:
    done: list[int] = []

    def fail() -> None:
        raise ValueError("this one")

    parts = [functools.partial(done.append, i) for i in range(5)]
    with pytest.raises(ValueError, match="this one"):
        _C.share_out(parts=[*parts, fail], threads=2)
    assert sorted(done) == [*range(5)]


def test_several_callers_at_once() -> None:
    """Python threads that each call ops, with OpenMP threads of their own."""
    problems = {name: problem(name, torch.float32, large=True) for name in NAMES}
    wanted = {name: one.run("cpu") for name, one in problems.items()}
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda name: (name, problems[name].run("cpu")), NAMES * 3))
    for name, result in got:
        assert_same(result, wanted[name])


def test_other_python_threads_run_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every function of the module that an op calls lets go of the interpreter.

    Python takes it away from nobody here, so that another thread gets its turns during a call or never.
    """
    monkeypatch.setenv("APV_FAST_CPU_ISA", "scalar")
    turns, done = 0, False
    called: set[str] = set()
    released: set[str] = {"supported_isas", "has_amx", "isa"}

    def spin() -> None:
        nonlocal turns
        while not done:
            turns += 1
            time.sleep(0)

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before = turns
            result = function(*args, **kwargs)
            called.add(name)
            if turns > before:
                released.add(name)
            return result

        return call

    for name, function in vars(_C).copy().items():
        if callable(function):
            monkeypatch.setattr(_C, name, watched(name, function))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)
    spinner = threading.Thread(target=spin)
    spinner.start()
    try:
        for attempt in range(20):  # a short call may end before the other thread wakes up
            for name in NAMES if attempt == 0 or not called <= released else ():
                problem(name, torch.float32, large=True).run("cpu")
    finally:
        done = True
        sys.setswitchinterval(interval)
        spinner.join()
    assert len(called) > 1 and called <= released


def test_after_fork() -> None:
    """The threads of the parent's OpenMP are missing in the child, which must not wait for them."""
    code = """
import os, sys, torch
from tests.support.cpu_problems import NAMES, problem
torch.set_num_threads(2)
problems = {name: problem(name, torch.float32, large=True) for name in NAMES}
wanted = {name: one.run("cpu") for name, one in problems.items()}
child = os.fork()
if child == 0:
    for name, one in problems.items():
        print(name, file=sys.stderr, flush=True)
        for key, x in one.run("cpu").items():
            if not torch.equal(x, wanted[name][key]):
                print(key, "differs", file=sys.stderr, flush=True)
                os._exit(1)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.get_num_threads() == 2
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr

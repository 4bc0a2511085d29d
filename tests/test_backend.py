"""The table op × backend: what is picked, in which order it is asked for, and what is said when it cannot run."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator

import pytest
import torch

import apv_fast
from apv_fast import BackendError, backend, use_backend
from apv_fast.backend import Status, requested, resolve
from apv_fast.ops import lambda_return
from apv_fast.ops.op import OPS

FLOAT = torch.zeros(1)
DOUBLE = FLOAT.double()


def fast(x: torch.Tensor) -> str:
    return "fast"


def slow(x: torch.Tensor) -> str:
    return "slow"


def probe_fast() -> Status:
    return Status(True, devices=("cpu",), isa="toy", dtypes=(torch.float32,))


def probe_slow() -> Status:
    return Status(True, devices=("cpu",), isa="toy", dtypes=(torch.float32, torch.float64))


def probe_absent() -> Status:
    return Status(False, "buy one")


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three made-up backends; "fast" does one op and one dtype, "slow" everything, "absent" does not run here."""
    names = ("absent", "fast", "slow")
    monkeypatch.setattr(backend, "PROBES", {name: f"{__name__}:probe_{name}" for name in names})
    everything = {"slow": f"{__name__}:slow", "absent": f"{__name__}:slow"}
    monkeypatch.setattr(
        backend, "IMPLEMENTATIONS", {"toy": everything | {"fast": f"{__name__}:fast"}, "other": everything}
    )
    monkeypatch.setattr(backend, "AUTO_ORDER", {"cpu": names})
    monkeypatch.setattr(backend, "STANDS_IN", {})
    monkeypatch.delenv("APV_FAST_BACKEND", raising=False)
    backend.probe.cache_clear()
    yield
    backend.probe.cache_clear()


@pytest.mark.parametrize(
    ("op", "tensor", "expected"),
    [("toy", FLOAT, fast), ("toy", DOUBLE, slow), ("other", FLOAT, slow)],
    ids=["best", "dtype", "op"],
)
def test_auto_takes_the_first_that_can(toy: None, op: str, tensor: torch.Tensor, expected: object) -> None:
    assert resolve(op, tensor) is expected


def test_auto_without_any_that_can(toy: None) -> None:
    with pytest.raises(BackendError, match=r"no backend can run toy: 'absent': buy one; 'fast'.*'slow'.*float16"):
        resolve("toy", FLOAT.half())


def test_precedence(toy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Argument, then ``use_backend``, then the environment, then "auto"."""
    assert requested(None) == "auto"
    monkeypatch.setenv("APV_FAST_BACKEND", "fast")
    assert requested(None) == "fast"
    with use_backend("slow"):
        assert requested(None) == "slow"
        assert requested("fast") == "fast"
        assert resolve("toy", FLOAT, "fast") is fast
        assert resolve("toy", FLOAT) is slow
    with use_backend("auto"):
        assert requested(None) == "auto"


@pytest.mark.parametrize("unstated", [None, "", "auto"])
def test_auto_as_argument_leaves_the_choice_to_the_context(toy: None, unstated: str | None) -> None:
    with use_backend("slow"):
        assert resolve("toy", FLOAT, unstated) is slow


def test_empty_environment_variable_is_auto(toy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APV_FAST_BACKEND", "")
    assert requested(None) == "auto"


def test_contexts_nest_and_end_with_an_exception(toy: None) -> None:
    with use_backend("slow"):
        with pytest.raises(KeyError), use_backend("fast"):
            assert requested(None) == "fast"
            raise KeyError
        assert requested(None) == "slow"
    assert requested(None) == "auto"


def test_unknown_names_say_where_they_came_from(toy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    known = "must be one of: auto, absent, fast, slow"
    with pytest.raises(BackendError, match=f"backend: unknown backend 'gpu'; {known}"):
        resolve("toy", FLOAT, "gpu")
    with pytest.raises(BackendError, match="use_backend: unknown backend 'gpu'"), use_backend("gpu"):
        pass
    monkeypatch.setenv("APV_FAST_BACKEND", "gpu")
    with pytest.raises(BackendError, match="APV_FAST_BACKEND: unknown backend 'gpu'"):
        resolve("toy", FLOAT)


@pytest.mark.parametrize(
    ("op", "name", "tensor", "why"),
    [
        ("other", "fast", FLOAT, r"it does not implement other \(those that do: slow, absent\)"),
        ("toy", "absent", FLOAT, "buy one"),
        ("toy", "fast", DOUBLE, r"it does not take torch\.float64 \(it takes: torch\.float32\)"),
        ("toy", "fast", FLOAT.to("meta"), "it takes tensors on cpu, not on meta"),
    ],
    ids=["op", "absent", "dtype", "device"],
)
def test_a_named_backend_that_cannot_is_not_replaced(
    toy: None, op: str, name: str, tensor: torch.Tensor, why: str
) -> None:
    with pytest.raises(BackendError, match=f"backend '{name}' cannot run {op}: {why}; backend='auto' picks one"):
        resolve(op, tensor, name)


def test_a_context_of_an_absent_backend_is_an_error(toy: None) -> None:
    with pytest.raises(BackendError, match="backend 'absent' cannot run here: buy one"), use_backend("absent"):
        pass
    assert requested(None) == "auto"


def test_a_backend_of_few_ops_leaves_the_others_to_its_stand_in(toy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only those that it does not implement at all; what it refuses, and what the stand-in refuses, is an error."""
    monkeypatch.setattr(backend, "STANDS_IN", {"fast": "slow", "absent": "slow"})
    assert resolve("toy", FLOAT, "fast") is fast
    assert resolve("other", FLOAT, "fast") is slow
    assert backend.choose("other", FLOAT, "fast") == "slow"
    assert resolve("other", DOUBLE, "fast") is slow  # it takes more
    with use_backend("fast"):
        assert resolve("other", FLOAT) is slow
    monkeypatch.delitem(backend.IMPLEMENTATIONS["other"], "absent")
    for op, name, tensor, why in (
        ("toy", "fast", DOUBLE, r"it does not take torch\.float64 \(it takes: torch\.float32\); "),
        ("other", "fast", FLOAT.half(), "it does not implement other, and 'slow', which does that for it, cannot"),
        ("other", "absent", FLOAT, "buy one; "),
    ):
        with pytest.raises(BackendError, match=f"backend '{name}' cannot run {op}: {why}"):
            resolve(op, tensor, name)
    assert str(backend.backends()["fast"]).endswith("ops: toy; all others: slow's")


def test_report(toy: None) -> None:
    report = backend.backends()
    assert {name: info.available for name, info in report.items()} == {"absent": False, "fast": True, "slow": True}
    assert str(report["absent"]) == "absent: not available: buy one"
    assert str(report["slow"]) == "slow: on cpu (toy); float32, float64; ops: toy, other"
    assert report["fast"].ops == ("toy",)


def test_real_report() -> None:
    report = apv_fast.backends()
    assert list(report) == ["reference", "cpu", "triton", "cuda"]
    assert report["reference"].available
    assert set(report["reference"].ops) == set(backend.IMPLEMENTATIONS)
    for info in report.values():
        assert info.available == (info.status.reason == "")
        assert info.available == bool(info.status.devices and info.status.dtypes and info.status.isa)


def test_a_stand_in_has_every_op() -> None:
    """So that a whole update runs on a backend by name."""
    for name, other in backend.STANDS_IN.items():
        assert name in backend.PROBES
        assert [op for op, row in backend.IMPLEMENTATIONS.items() if other not in row] == []


@pytest.mark.parametrize("op", backend.IMPLEMENTATIONS)
def test_every_function_of_the_table_takes_the_reference_arguments(op: str) -> None:
    """Which are the fields of the op's call; functions that only hand the call on may not list them."""
    row = backend.IMPLEMENTATIONS[op]
    expected = list(inspect.signature(backend._implementation(op, "reference")).parameters)
    if op in OPS:
        assert list(OPS[op].signature.call._fields) == expected
    for name, target in row.items():
        assert name in backend.PROBES
        if not backend.probe(name).available:
            continue
        module, _, function = target.partition(":")
        parameters = inspect.signature(getattr(importlib.import_module(module), function)).parameters
        if op in OPS and list(parameters) == ["fields"]:
            continue
        assert list(parameters)[: len(expected)] == expected, name
        own = list(parameters.values())[len(expected) :]  # what a caller that knows the cell may give it
        assert all(parameter.default is not parameter.empty for parameter in own), name


def test_ops_obey_context_environment_and_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real op, in a table where only the reference implements it."""
    only = {"reference": backend.IMPLEMENTATIONS["lambda_return"]["reference"]}
    monkeypatch.setitem(backend.IMPLEMENTATIONS, "lambda_return", only)
    monkeypatch.setattr(backend, "probe", lambda name: Status(True, "", ("cpu",), "toy", (torch.float32,)))

    def run(name: str | None = None) -> torch.Tensor:
        return lambda_return(FLOAT[None], FLOAT[None], FLOAT[None], FLOAT, backend=name)

    refused = "backend 'cpu' cannot run lambda_return: it does not implement"
    assert run().shape == (1, 1)
    with pytest.raises(BackendError, match=refused):
        run("cpu")
    with use_backend("cpu"):
        assert run("reference").shape == (1, 1)
        with pytest.raises(BackendError, match=refused):
            run()
    monkeypatch.setenv("APV_FAST_BACKEND", "cpu")
    with pytest.raises(BackendError, match=refused):
        run()
    with use_backend("reference"):
        assert run().shape == (1, 1)

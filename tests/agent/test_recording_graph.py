"""The recording graph catches what a CUDA graph would freeze or refuse."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from apv_fast.agent.cuda_graph import optimizer_tensors
from tests.support.recording_graph import CaptureError, RecordingGraph


def test_optimizer_tensors_are_found_at_any_depth() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    adam = torch.optim.Adam([weight], lr=torch.tensor(0.1), capturable=False)
    weight.sum().backward()
    adam.step()
    tensors = list(optimizer_tensors(adam))
    # The weight, its rate (in the group and the defaults), step, and two moments.
    assert {tuple(tensor.shape) for tensor in tensors} == {(3,), ()} and len(tensors) >= 5


def faulty(name: str) -> Callable[[Tensor, Tensor], object]:
    """A function of a state and an input, ``[4]`` each, which a graph cannot hold."""
    counter = itertools.count(1)
    box = [torch.zeros(4)]

    def replace_tensor(state: Tensor, x: Tensor) -> None:
        box[0] = box[0] + x
        state.copy_(box[0])

    functions: dict[str, Callable[[Tensor, Tensor], object]] = {
        "host counter": lambda state, x: state.add_(x * next(counter)),
        "host random number": lambda state, x: state.add_(x * float(torch.Generator().seed() % 1000 + next(counter))),
        "replaced tensor": replace_tensor,
        "hidden from the dispatcher": lambda state, x: hidden(state),
        "item": lambda state, x: state.add_(x.sum().item()),
        "float": lambda state, x: state.add_(float(x[0])),
        "int": lambda state, x: state[: int(x[0])].add_(1),
        "if": lambda state, x: state.add_(1) if x[0] > 0 else state.sub_(1),
        "tolist": lambda state, x: state.add_(sum(x.tolist())),
        "cpu": lambda state, x: state.add_(x.cpu()),
        "to cpu": lambda state, x: state.add_(x.to("cpu")),
        "numpy": lambda state, x: x.numpy(),
        "nonzero": lambda state, x: state.add_(len(x.nonzero())),
        "unique": lambda state, x: state.add_(len(x.unique())),
        "masked_select": lambda state, x: state.add_(x.masked_select(x > 0).sum()),
        "mask": lambda state, x: state.add_(x[x > 0].sum()),
        "put at a mask": lambda state, x: state.__setitem__(x > 0, x[1]),
        "equal": lambda state, x: torch.equal(state, x),
        "allclose": lambda state, x: torch.allclose(state, x),
        "tensor from a number": lambda state, x: state.add_(torch.tensor(1.0)),
        "tensor from a list": lambda state, x: state.add_(torch.as_tensor([1.0, 2.0, 3.0, 4.0])),
    }
    return functions[name]


def hidden(state: Tensor) -> None:
    """Work on a raw pointer, as a C function does it."""
    import ctypes

    ctypes.cast(state.data_ptr(), ctypes.POINTER(ctypes.c_float))[0] += 1


FROZEN = ["host counter", "host random number", "replaced tensor", "hidden from the dispatcher"]

REFUSED = [
    *("item", "float", "int", "if", "tolist", "cpu", "to cpu", "numpy", "nonzero", "unique", "masked_select", "mask"),
    *("put at a mask", "equal", "allclose", "tensor from a number", "tensor from a list"),
]


@pytest.mark.parametrize("name", FROZEN)
def test_what_is_frozen_shows(name: str) -> None:
    x = torch.tensor([1.0, -2.0, 3.0, 4.0])
    plain, state = torch.zeros(4), torch.zeros(4)
    work = faulty(name)
    for _ in range(3):
        work(plain, x)
    again = faulty(name)
    replay = RecordingGraph(lambda: [state]).record(lambda: again(state, x))
    for _ in range(3):
        replay()
    assert not torch.equal(plain, state)


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_stop_a_capture_is_refused(name: str) -> None:
    state, x = torch.zeros(4), torch.tensor([1.0, -2.0, 3.0, 4.0])
    with pytest.raises(CaptureError):
        RecordingGraph(lambda: [state]).record(lambda: faulty(name)(state, x))
    assert not state.any(), "what the recording changed is put back"


def test_what_a_graph_can_hold_is_held() -> None:
    """Views, changes in place, random numbers, autograd, clocks on the device, a batch that changes."""
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
    batch, clock = torch.zeros(5, 4), torch.zeros((), dtype=torch.int64)

    def work() -> None:
        weight.grad = None
        noise = torch.randn(5, 3)
        ((batch @ weight.t() + noise).tanh()[:, 1:].square().sum() * (clock % 2)).backward()
        with torch.no_grad():
            weight.t()[0].sub_(0.1)
            assert weight.grad is not None
            weight.sub_(weight.grad)
            clock.add_(1)

    def go(step: Callable[[], object]) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        for index in range(4):
            batch.fill_(index / 10)
            step()
        return weight.detach().clone(), clock.clone()

    start = weight.detach().clone()
    expected = go(work)
    with torch.no_grad():
        weight.copy_(start)
        clock.zero_()
    graph = RecordingGraph(lambda: [weight, clock])
    replay = graph.record(work)
    assert torch.equal(weight, start) and not clock.any() and graph.operations > 10
    got = go(replay)
    assert torch.equal(expected[0], got[0]) and torch.equal(expected[1], got[1])

"""The recorder of CUDA graphs, against a torch.cuda that writes down what it is asked for."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from apv_fast.agent.cuda_graph import CudaRecorder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of a torch.cuda that does nothing."""
    log: list[str] = []

    def note(name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: log.append(name)

    @contextlib.contextmanager
    def inside(name: str) -> Iterator[None]:
        log.append(name)
        yield
        log.append(f"end of {name}")

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            log.append(f"{self.name} waits for {other.name}")

    current = Stream("current")
    generator = types.SimpleNamespace(graphsafe_set_state=note("new random state"))
    for name, value in {
        "Stream": Stream,
        "CUDAGraph": lambda: types.SimpleNamespace(replay=note("replay")),
        "current_stream": lambda: current,
        "set_stream": lambda stream: log.append(f"back to {stream.name}"),
        "stream": lambda stream: inside(f"stream {stream.name}"),
        "graph": lambda graph, stream, capture_error_mode: inside(f"{capture_error_mode} capture on {stream.name}"),
        "device": lambda device: contextlib.nullcontext(),
        "synchronize": note("synchronize"),
        "default_generators": (generator,),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "Generator", lambda device: types.SimpleNamespace(graphsafe_get_state=lambda: None))
    return log


def test_the_cuda_recorder(calls: list[str]) -> None:
    recorder = CudaRecorder(torch.device("cuda", 0))
    recorder.warm_up(lambda: calls.append("work"))
    warm_up = ["side waits for current", "stream side", "work", "end of stream side", "current waits for side"]
    assert calls == warm_up
    calls.clear()
    replay = recorder.record(lambda: calls.append("work"))
    captured = ["thread_local capture on side", "work", "end of thread_local capture on side", "back to current"]
    assert calls == captured
    calls.clear()
    replay()
    recorder.recover()
    assert calls == ["replay", "synchronize", "new random state"]


def test_the_cuda_recorder_knows_a_generator(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is registered before the capture, and gets a new state after one that failed, like torch's own."""
    graph = types.SimpleNamespace(
        replay=None, register_generator_state=lambda one: calls.append(f"register {one.name}")
    )
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    own: Any = types.SimpleNamespace(name="own", graphsafe_set_state=lambda state: calls.append("own random state"))
    recorder = CudaRecorder(torch.device("cuda", 0), own)
    recorder.warm_up(lambda: None)
    calls.clear()
    recorder.record(lambda: calls.append("work"))
    recorder.recover()
    captured = ["thread_local capture on side", "work", "end of thread_local capture on side", "back to current"]
    assert calls == ["register own", *captured, "synchronize", "new random state", "own random state"]


def test_the_cuda_recorder_leaves_the_side_stream_when_a_capture_fails(calls: list[str]) -> None:
    recorder = CudaRecorder(torch.device("cuda", 0))
    recorder.warm_up(lambda: None)
    with pytest.raises(ZeroDivisionError):
        recorder.record(lambda: 1 // 0)
    assert calls[-1] == "back to current"

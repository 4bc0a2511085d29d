"""One update, or one step of acting, as one CUDA graph: recorded once, replayed for every batch.

A graph repeats the recorded kernels on the recorded addresses with the recorded constants. So a recorded update may
decide nothing on the host that changes from one update to the next: clocks, rates and queues are tensors. Random
numbers differ from replay to replay because torch keeps its CUDA generator's offset in a tensor too. Graphs that may
run at the same time need generators of their own, since a replay writes that tensor.

Before recording, the update runs on a side stream, which compiles kernels and lets the allocator and the libraries make
what they make once; then everything it changed is put back. So the first recorded update is the first update, and a run
has the same numbers with and without a graph.

Limits: batches of one shape; one device; the metrics that a call returns are overwritten by the next call.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from apv_fast.config import ConfigError, Graph
from apv_fast.profile import annotate
from apv_fast.run import restore_rng, rng_state

Tensors = dict[str, Tensor]
Learn = Callable[[Tensors], Tensors]

WARM_UP = 2  # updates: optimisers, cuDNN and Triton have made everything in the first; the second shows it


class Recorder(Protocol):
    """What records and replays work; tests have one for the CPU."""

    def warm_up(self, work: Callable[[], object]) -> None:
        """Run ``work`` where it will be recorded."""
        ...

    def record(self, work: Callable[[], object]) -> Callable[[], object]:
        """Record ``work`` without running it; returns what replays it."""
        ...

    def recover(self) -> None:
        """After a recording that failed: make the device usable again."""
        ...


# Captures that failed. torch's allocator may go on asking such a graph whether a stream is its own.
_abandoned: list[torch.cuda.CUDAGraph] = []


class CudaRecorder:
    """Records CUDA graphs on a stream of its own.

    Args:
        device: a GPU.
        generator: what is recorded draws from it, if not from torch's default.
    """

    def __init__(self, device: torch.device, generator: torch.Generator | None = None) -> None:
        self.device, self.generator = device, generator
        self.stream: torch.cuda.Stream | None = None  # made when needed: it starts CUDA

    def warm_up(self, work: Callable[[], object]) -> None:
        """Run ``work`` on the stream, in order with what the current stream does before and after."""
        with torch.cuda.device(self.device):
            self.stream = self.stream or torch.cuda.Stream()
            current = torch.cuda.current_stream()
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                work()
            current.wait_stream(self.stream)

    def record(self, work: Callable[[], object]) -> Callable[[], object]:
        """Capture ``work`` as a graph. torch registers its default generator with it by itself."""
        graph = torch.cuda.CUDAGraph()
        if self.generator is not None:
            graph.register_generator_state(self.generator)
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            try:
                # On the stream of the warm-up: what autograd remembers of it then belongs to the capture.
                # Another thread reads the next batches meanwhile; what it does (pinning memory) is no part of this.
                with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                    work()
            except BaseException:
                _abandoned.append(graph)
                raise
            finally:
                torch.cuda.set_stream(current)  # a capture that fails does not do this itself
        return graph.replay

    def recover(self) -> None:
        """Give the generators new states: those that took part in a failed capture refuse to go on."""
        torch.cuda.synchronize(self.device)
        for one in (torch.cuda.default_generators[self.device.index or 0], self.generator):
            if one is not None:
                fresh = torch.Generator(self.device)
                one.graphsafe_set_state(fresh.graphsafe_get_state())


class GraphedUpdate:
    """Runs ``learn(batch) → metrics``, as a graph or as it is.

    Args:
        learn: an update; takes a batch on the device and returns scalars on the device.
        state: all tensors that ``learn`` changes from one call to the next.
        device: where they are.
        mode: "auto" records on a CUDA device, and goes on without a graph, with a warning, if that fails; "on" makes a
            failure an error; "off" never records.
        recorder: None takes CUDA graphs.
        what: what ``learn`` does, for people: "update", "acting step".
        generator: what ``learn`` draws from; None: torch's default.
        search: cuDNN times its algorithms for every convolution in the warm-up, and the recording takes the fastest.
            Which one that is may differ from process to process, and with it the rounding.
        ready: called before recording and before each replay: makes true what the recorded update takes for granted.

    Raises:
        ConfigError: ``mode`` is "on" and the device is no GPU.
    """

    def __init__(
        self,
        learn: Learn,
        state: Callable[[], Iterable[Tensor]],
        device: torch.device,
        mode: Graph,
        recorder: Recorder | None = None,
        *,
        what: str = "update",
        generator: torch.Generator | None = None,
        search: bool = False,
        ready: Callable[[], object] = lambda: None,
    ) -> None:
        if mode not in ("auto", "on", "off"):
            raise ConfigError(f"graph is {mode!r}; it must be 'auto', 'on' or 'off'")
        if recorder is None and device.type != "cuda":
            if mode == "on":
                raise ConfigError(
                    f"graph is 'on', but the device is {device.type} and a CUDA graph needs a GPU; "
                    "use --graph auto or off"
                )
            self.reason = f"the device is {device.type}"
        else:
            self.reason = "graph is 'off'" if mode == "off" else ""
        self._learn, self._state, self._device, self._mode = learn, state, device, mode
        self._recorder = recorder or CudaRecorder(device, generator)
        self._what, self._generator = what, generator
        self._search, self._ready = search, ready
        self._inputs: Tensors = {}
        self._metrics: Tensors = {}
        self._replay: Callable[[], object] | None = None

    @property
    def description(self) -> str:
        """How updates run, and why they do not run as a graph."""
        return f"eager ({self.reason})" if self.reason else f"one CUDA graph an {self._what}"

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensors:
        """One update from a batch on any device.

        Returns:
            The metrics: scalars on the device, good until the next call.

        Raises:
            ValueError: the batch has other keys or shapes than the first one.
        """
        with annotate(self._what):
            if not self.reason and self._replay is None:
                self._prepare(batch)
            if self._replay is None:
                return self._learn({name: value.to(self._device, non_blocking=True) for name, value in batch.items()})
            self._load(batch)
            self._ready()
            self._replay()
            return self._metrics

    def forget(self) -> None:
        """Drop the recording: the state's tensors have been replaced. The next call records anew."""
        self._replay, self._inputs, self._metrics = None, {}, {}

    def _work(self) -> None:
        self._metrics = self._learn(dict(self._inputs))

    def _prepare(self, batch: Mapping[str, Tensor]) -> None:
        """Warm up, put everything back, record."""
        self._inputs = {name: torch.empty_like(value, device=self._device) for name, value in batch.items()}
        self._load(batch)
        random = self._random()
        saved = [(tensor, tensor.clone()) for tensor in _unique(self._state())]
        try:
            with _searching(self._search):
                for _ in range(WARM_UP):
                    self._recorder.warm_up(self._work)
        finally:
            with torch.no_grad():
                for tensor, value in saved:
                    tensor.copy_(value)
            self._restore(random)
        del saved
        self._metrics = {}
        self._ready()
        try:
            self._replay = self._recorder.record(self._work)
        except RuntimeError as error:
            self._recorder.recover()
            self._restore(random)
            self.forget()
            why = _cause(error)
            if self._mode == "on":
                raise RuntimeError(
                    f"the {self._what} cannot be recorded as a CUDA graph: {why}; --graph off works"
                ) from error
            self.reason = f"recording failed: {why}"
            warnings.warn(f"{self._what}s run eagerly, without a CUDA graph: {self.reason}", stacklevel=3)

    def _random(self) -> Any:
        return rng_state() if self._generator is None else self._generator.get_state()

    def _restore(self, random: Any) -> None:
        if self._generator is None:
            restore_rng(random)
        else:
            self._generator.set_state(random)

    def _load(self, batch: Mapping[str, Tensor]) -> None:
        """Copy the batch to where the graph reads it."""
        if batch.keys() != self._inputs.keys():
            names, first = sorted(batch), sorted(self._inputs)
            raise ValueError(f"{self._what}: batch has {names}; it must have {first} as the first one")
        for name, place in self._inputs.items():
            value = batch[name]
            if value.shape != place.shape or value.dtype != place.dtype:
                raise ValueError(
                    f"{self._what}: {name} is {value.dtype} {tuple(value.shape)}; it must be {place.dtype} "
                    f"{tuple(place.shape)}, as in the first batch that was recorded"
                )
            place.copy_(value, non_blocking=True)


@contextlib.contextmanager
def _searching(search: bool) -> Iterator[None]:
    """Inside, a convolution of a form that torch has not met yet times cuDNN's algorithms and remembers the fastest.

    torch looks them up whether or not it may search, so a recording that comes after takes what was found here.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or search
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _cause(error: BaseException) -> str:
    """What failed first: ending a capture that was broken off is an error too, which says less."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).strip().partition("\n")[0]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Every tensor that an optimiser holds: weights, moments, clocks, rates, flat buffers."""
    return _walk(vars(optimizer))


def _walk(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value.detach()
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _walk(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _walk(inner)


def _unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Each piece of memory once."""
    unique = {(t.untyped_storage().data_ptr(), t.storage_offset(), tuple(t.shape), t.stride()): t for t in tensors}
    return list(unique.values())

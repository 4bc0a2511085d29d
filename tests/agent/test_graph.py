"""Updates as graphs: the same numbers as without, on a GPU by CUDA graphs and elsewhere by recorded operations."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apv_fast import backend
from apv_fast.agent import Agent, Pretrainer
from apv_fast.agent.cuda_graph import CudaRecorder, GraphedUpdate, Recorder, optimizer_tensors
from apv_fast.config import ConfigError
from apv_fast.ops import noise
from apv_fast.run import restore_rng, rng_state
from tests.agent.test_agent import CPU, FILE, FINETUNE, PRETRAIN, VARIANTS, differing, make_batch
from tests.support.recording_graph import CaptureError, RecordingGraph

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda") if GPU else CPU
KINDS: dict[str, Any] = {
    "video": PRETRAIN,
    **VARIANTS,
    "discrete": FINETUNE,
    # The video model's rate is switched on before the update of index 5, so between two replays.
    "frozen": replace(FINETUNE, pretrained=Path("x"), freeze_updates=5),
    "self": replace(FINETUNE, video_bonus=replace(FINETUNE.video_bonus, exclude_self=True, reduce="kth")),
}


def learner(kind: str, device: torch.device = DEVICE, *, graph: str = "off", engine: str | None = None) -> Any:
    torch.manual_seed(0)
    engine = engine or ("auto" if GPU else "reference")  # the kernels for the CPU may read their arguments' values
    config: Any = replace(KINDS[kind], graph=graph, backend=engine)
    if kind == "video":
        return Pretrainer(config, device)
    return Agent(config, 2, discrete=kind == "discrete", device=device)


def recorded(one: Any, recorder: Recorder | None = None, mode: Any = "on") -> Any:
    """The learner with its updates as a graph."""
    recorder = recorder or (CudaRecorder(DEVICE) if GPU else RecordingGraph(one.tensors))
    one.run = GraphedUpdate(one.learn, one.tensors, DEVICE, mode, recorder, ready=one.run._ready)
    return one


def train(one: Any, seeds: range, **shape: int) -> list[dict[str, Tensor]]:
    """The metrics of updates from seeded batches."""
    return [{name: value.clone() for name, value in one.update(make_batch(seed, **shape)).items()} for seed in seeds]


@pytest.fixture(autouse=True)
def _noise_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's operations: what C++ writes into memory cannot be recorded."""
    monkeypatch.setattr(noise, "seeded", lambda *_: False)


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    """On a GPU two runs of the same kernels must have the same bits."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


def assert_replays_are_updates(kind: str, updates: int = 8, engine: str | None = None, **shape: int) -> None:
    plain, graphed = learner(kind, engine=engine), recorded(learner(kind, engine=engine))
    results = []
    for one in (plain, graphed):
        torch.manual_seed(1)
        results.append((train(one, range(updates), **shape), rng_state()))
    assert differing(plain.state_dict(), graphed.state_dict()) == []
    assert differing(results[0][0], results[1][0]) == [], "metrics"
    assert differing(results[0][1], results[1][1]) == [], "random numbers used"
    assert graphed.run.description == "one CUDA graph an update" and graphed.updates == updates


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_replays_are_updates(kind: str) -> None:
    """Weights, moments, clocks, queue, normaliser, metrics: bit for bit over every clock's boundary.

    The slow critic is copied in updates 0, 3 and 6; the queue of 9 rows is full after two updates of 6 each.
    """
    assert_replays_are_updates(kind)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["video", "stacked"])
@pytest.mark.skipif(GPU, reason="on a GPU the kernels are what the test above runs")
def test_replays_of_the_kernels_are_updates(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with every Triton kernel that there is, interpreted."""
    monkeypatch.setitem(backend.AUTO_ORDER, "cpu", ("triton", "reference"))
    monkeypatch.setattr("apv_fast.agent.cuda_graph.WARM_UP", 1)
    assert_replays_are_updates(kind, updates=2, engine="auto", batch=1, length=2)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_on_the_learners_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the "meta" device, which has shapes and no values: reading a value fails, and so does a tensor on the CPU."""
    meta = torch.device("meta")
    monkeypatch.setattr(backend, "_obstacle", lambda op, name, *more: None if name == "reference" else "not here")
    one = learner(kind, meta)
    metrics = one.learn({name: value.to(meta) for name, value in make_batch().items()})
    assert {value.device for value in metrics.values()} == {meta}
    assert {tensor.device for tensor in one.tensors()} == {meta}


class Unreplayed:
    """Warms up, and records nothing."""

    def warm_up(self, work: Callable[[], object]) -> None:
        work()

    def record(self, work: Callable[[], object]) -> Callable[[], object]:
        return lambda: None

    def recover(self) -> None:
        raise AssertionError("nothing failed")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["video", "stacked"])
def test_the_warm_up_leaves_no_trace(kind: str) -> None:
    one = learner(kind)
    before, random = copy.deepcopy(one.state_dict()), rng_state()
    held = list(one.tensors())  # alive, so that no two share an id
    recorded(one, Unreplayed()).update(make_batch())
    assert one.state_dict().keys() == before.keys()
    assert differing(before | {"updates": 1}, one.state_dict()) == []
    assert differing(random, rng_state()) == []
    now = list(one.tensors())
    assert len({*map(id, held)}) == len({*map(id, now)}), "nothing is made in the first update"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["video", "frozen"])
def test_a_restored_graph_goes_on_bit_for_bit(kind: str) -> None:
    """Into a learner that has a graph already, and into one that will have none."""
    one = recorded(learner(kind))
    train(one, range(4))
    saved, random = copy.deepcopy(one.state_dict()), rng_state()
    assert type(saved["updates"]) is int
    train(one, range(4, 7))
    for other in (recorded(learner(kind)), learner(kind)):
        train(other, range(90, 92))
        other.restore(copy.deepcopy(saved), FILE)
        restore_rng(random)
        train(other, range(4, 7))
        assert differing(one.state_dict(), other.state_dict()) == []


class Watching(Unreplayed):
    """Writes down when cuDNN may search."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bool]] = []

    def warm_up(self, work: Callable[[], object]) -> None:
        work()
        self.seen.append(("warm-up", torch.backends.cudnn.benchmark))

    def record(self, work: Callable[[], object]) -> Callable[[], object]:
        self.seen.append(("recording", torch.backends.cudnn.benchmark))
        return lambda: self.seen.append(("replay", torch.backends.cudnn.benchmark))


@pytest.mark.parametrize("search", [False, True])
def test_algorithms_are_searched_in_the_warm_up_alone(search: bool) -> None:
    watching, inside = Watching(), list[bool]()

    def learn(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        inside.append(torch.backends.cudnn.benchmark)
        return batch

    update = GraphedUpdate(learn, list, DEVICE, "on", watching, search=search)
    for _ in range(2):
        update({"x": torch.zeros(2)})
    assert watching.seen == [*[("warm-up", search)] * 2, ("recording", False), *[("replay", False)] * 2]
    assert inside == [search] * 2 and not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("before", [False, True])
def test_a_search_that_breaks_off_is_ended(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that somebody else allowed goes on."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    inside = []

    def learn(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        inside.append(torch.backends.cudnn.benchmark)
        return {"x": batch["y"]}

    for search in (False, True):
        update = GraphedUpdate(learn, list, DEVICE, "on", Watching(), search=search)
        with pytest.raises(KeyError):
            update({"x": torch.zeros(2)})
        assert torch.backends.cudnn.benchmark == before
    assert inside == [before, True]


@pytest.mark.parametrize("search", [False, True])
def test_learners_search_when_they_are_told_to(search: bool) -> None:
    for kind in ("video", "plain"):
        config: Any = replace(KINDS[kind], conv_search=search, backend="reference", graph="off")
        one = Pretrainer(config, CPU) if kind == "video" else Agent(config, 2, discrete=False, device=CPU)
        assert one.run._search is search


class Failing(Unreplayed):
    """A capture that is broken off, as torch reports it: the end of the capture fails too."""

    recovered = 0

    def record(self, work: Callable[[], object]) -> Callable[[], object]:
        work()
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904  (as torch)

    def recover(self) -> None:
        self.recovered += 1
        torch.manual_seed(99)  # torch's generator is another one


def test_a_capture_that_fails_is_said_and_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, failing = learner("plain"), Failing()
    torch.manual_seed(1)
    train(plain, range(2))
    # Recording runs the update here, which a CUDA graph does not.
    one = recorded(learner("plain"), failing, "auto")
    learn, calls = one.learn, itertools.count()
    one.run._learn = lambda batch: learn(batch) if next(calls) != 2 else {}
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="updates run eagerly, without a CUDA graph: recording failed: operation not"):
        train(one, range(1))
    train(one, range(1, 2))
    assert differing(plain.state_dict(), one.state_dict()) == []
    assert failing.recovered == 1
    assert one.run.description == "eager (recording failed: operation not permitted when stream is capturing)"
    with pytest.raises(
        RuntimeError, match=r"cannot be recorded as a CUDA graph: operation not permitted .*; --graph off"
    ):
        recorded(learner("plain"), Failing(), "on").update(make_batch())


def test_an_update_that_fails_is_no_capture_that_fails() -> None:
    one = recorded(learner("video"), mode="auto")
    one.run._learn = lambda batch: batch["nothing"]
    with pytest.raises(KeyError, match="nothing"):
        one.update(make_batch())


@pytest.mark.skipif(GPU, reason="needs a machine without a GPU")
def test_a_graph_without_a_gpu() -> None:
    for kind in ("video", "plain"):
        with pytest.raises(ConfigError, match=r"graph is 'on', but the device is cpu .* use --graph auto or off"):
            learner(kind, graph="on")
        assert learner(kind, graph="auto").run.description == "eager (the device is cpu)"
    with pytest.raises(ConfigError, match="graph is 'yes'; it must be 'auto', 'on' or 'off'"):
        learner("plain", graph="yes")


@pytest.mark.gpu
def test_batches_of_another_form() -> None:
    one = recorded(learner("video"))
    batch = make_batch()
    one.update(batch)
    with pytest.raises(ValueError, match=r"image is torch.uint8 \(3, 4, 64, 64, 3\); it must be torch.uint8 \(2, 4,"):
        one.update(make_batch(batch=3))
    with pytest.raises(ValueError, match=r"is_first is torch.int64 \(2, 4\); it must be torch.bool"):
        one.update(batch | {"is_first": batch["is_first"].long()})
    with pytest.raises(ValueError, match=r"batch has \['image'\]; it must have \['action', 'image'"):
        one.update({"image": batch["image"]})


@pytest.mark.gpu
def test_a_batch_is_copied_and_metrics_are_overwritten() -> None:
    one = recorded(learner("video"))
    batch = make_batch()
    first = one.update(batch)["image_loss"]
    before = first.clone()
    assert one.update({name: value.clone() for name, value in make_batch(1).items()})["image_loss"] is first
    assert not torch.equal(before, first)
    assert torch.equal(batch["image"], make_batch()["image"])


# The recording graph catches what a CUDA graph would freeze or refuse


def test_optimizer_tensors_are_found_at_any_depth() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    adam = torch.optim.Adam([weight], lr=torch.tensor(0.1), capturable=False)
    weight.sum().backward()
    adam.step()
    found = list(optimizer_tensors(adam))
    # The weight, its rate (in the group and the defaults), step, and two moments.
    assert {tuple(tensor.shape) for tensor in found} == {(3,), ()} and len(found) >= 5


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


# CUDA's side, against a torch.cuda that writes down what it is asked for


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of a torch.cuda that does nothing."""
    made: list[str] = []

    def note(name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: made.append(name)

    @contextlib.contextmanager
    def inside(name: str) -> Iterator[None]:
        made.append(name)
        yield
        made.append(f"end of {name}")

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            made.append(f"{self.name} waits for {other.name}")

    current = Stream("current")
    generator = types.SimpleNamespace(graphsafe_set_state=note("new random state"))
    for name, value in {
        "Stream": Stream,
        "CUDAGraph": lambda: types.SimpleNamespace(replay=note("replay")),
        "current_stream": lambda: current,
        "set_stream": lambda stream: made.append(f"back to {stream.name}"),
        "stream": lambda stream: inside(f"stream {stream.name}"),
        "graph": lambda graph, stream, capture_error_mode: inside(f"{capture_error_mode} capture on {stream.name}"),
        "device": lambda device: contextlib.nullcontext(),
        "synchronize": note("synchronize"),
        "default_generators": (generator,),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "Generator", lambda device: types.SimpleNamespace(graphsafe_get_state=lambda: None))
    return made


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


@pytest.mark.gpu
def test_after_a_capture_that_fails() -> None:
    """Updates go on, with the random numbers that they would have had, and others can still be recorded."""
    state, batch = torch.zeros(4, device=DEVICE), {"x": torch.ones(4)}

    def learn(batch: dict[str, Tensor], *, waits: bool) -> dict[str, Tensor]:
        state.add_(torch.rand_like(state))
        return {"sum": state.sum() + (float(batch["x"].sum()) if waits else 0.0)}

    def train(step: Callable[[dict[str, Tensor]], object]) -> Tensor:
        state.zero_()
        torch.manual_seed(0)
        for _ in range(3):
            step(batch)
        return state.clone()

    expected = train(functools.partial(learn, waits=False))
    fails, works = (
        GraphedUpdate(
            functools.partial(learn, waits=waits),
            lambda: [state],
            DEVICE,
            "auto",
            CudaRecorder(DEVICE) if GPU else RecordingGraph(lambda: [state]),
        )
        for waits in (True, False)
    )
    with pytest.warns(UserWarning, match="updates run eagerly, without a CUDA graph: recording failed"):
        assert torch.equal(train(fails), expected)
    assert torch.equal(train(works), expected)
    assert works.description == "one CUDA graph an update"

"""Updates as graphs: the same numbers as without, on a GPU by CUDA graphs and elsewhere by recorded operations."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from apv_fast import backend
from apv_fast.agent import Agent, Pretrainer
from apv_fast.agent.cuda_graph import CudaRecorder, GraphedUpdate
from apv_fast.config import ConfigError
from apv_fast.ops import noise
from apv_fast.run import restore_rng, rng_state
from tests.support.graphs import DEVICE, GPU, KINDS, learner, recorded, train
from tests.support.learners import CPU, FILE, differing, make_batch
from tests.support.recording_graph import RecordingGraph


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
    plain, graphed = learner(kind, backend=engine), recorded(learner(kind, backend=engine))
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

"""Updates beside the environments: one update old, whatever takes how long; the same bits again, and after a resume."""

from __future__ import annotations

import copy
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from apv_fast.agent import Agent
from apv_fast.agent import overlap as overlap_module
from apv_fast.agent.acting import Acting
from apv_fast.agent.agent_policy import AgentPolicy
from apv_fast.agent.overlap import Updates
from apv_fast.cli import main, parse
from apv_fast.commands.finetune import finetune
from apv_fast.data import Replay
from apv_fast.ops import noise
from apv_fast.run import latest_checkpoint, load_checkpoint, read_metrics
from tests.support.corridor import Corridor
from tests.support.learners import CORRIDOR, CPU, VARIANTS, differing, make_batch
from tests.support.recording_graph import RecordingGraph

IMAGES = make_batch(seed=5, batch=3, length=8)["image"]


def learner(kind: str = "stacked", backend: Any = "auto") -> Agent:
    torch.manual_seed(0)
    return Agent(replace(VARIANTS[kind], backend=backend), 2, discrete=False, device=CPU)


def weights(acting: Acting) -> dict[str, Any]:
    return copy.deepcopy(acting.state_dict())


@pytest.fixture
def updates() -> Iterator[Callable[..., Updates]]:
    """Makes them, and lets their threads go."""
    opened: list[Updates] = []

    def make(agent: Agent, *, overlap: bool = True, seed: int = 3) -> Updates:
        opened.append(Updates(agent, overlap=overlap, seed=seed))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


# One update old


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("kind", ["stacked", "plain", "gaussian", "bf16"])
def test_what_acts_is_one_update_old(kind: str, backend: str, updates: Callable[..., Updates]) -> None:
    """Weights and actions, against an agent whose updates are done one after the other."""
    plain = learner(kind, backend)
    torch.manual_seed(1)
    past = [copy.deepcopy(plain.acting)]  # after 0, 1, 2, ... updates
    for seed in range(4):
        plain.update(make_batch(seed))
        past.append(copy.deepcopy(plain.acting))
    torch.manual_seed(2)
    after = torch.rand(3)

    agent = learner(kind, backend)
    beside = updates(agent)
    policy = AgentPolicy(agent, explore=True, acting=beside.acting, generator=beside.generator)
    generator, memory = torch.Generator().manual_seed(3), None
    torch.manual_seed(1)
    first = np.array([True, True, True])
    for seed in range(4):
        beside.begin(make_batch(seed), lambda metrics: None)
        assert beside.begun == seed + 1
        for step in range(2):  # while the update runs
            image = IMAGES[:, 2 * seed + step]
            began = first if seed == step == 0 else ~first
            action = policy(image.numpy(), began)
            expected, memory = past[seed](image, torch.from_numpy(began), memory, explore=True, generator=generator)
            np.testing.assert_array_equal(action, expected.float().numpy())
        assert differing(beside.acting.state_dict(), past[seed].state_dict()) == []
        assert differing(past[seed].state_dict(), past[seed + 1].state_dict()), "an update that changes nothing"
    beside.wait()
    assert differing(agent.state_dict(), plain.state_dict()) == [], "acting leaves training's random numbers alone"
    assert agent.updates == 4
    torch.manual_seed(2)
    assert torch.equal(torch.rand(3), after)


def test_without_overlap_the_newest_weights_act(updates: Callable[..., Updates]) -> None:
    agent = learner()
    at_once = updates(agent, overlap=False)
    seen: list[int] = []
    for seed in range(2):
        at_once.begin(make_batch(seed), lambda metrics: seen.append(threading.get_ident()))
        assert agent.updates == at_once.begun == seed + 1
    assert at_once.acting is agent.acting and at_once.generator is None and at_once.state_dict() is None
    assert seen == [threading.get_ident()] * 2


def test_an_update_runs_while_it_is_played(updates: Callable[..., Updates], monkeypatch: pytest.MonkeyPatch) -> None:
    agent = learner()
    beside, played, update = updates(agent), threading.Event(), agent.update

    def slow(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        assert played.wait(30), "nobody plays while the update runs"
        return update(batch)

    monkeypatch.setattr(agent, "update", slow)
    beside.begin(make_batch(), lambda metrics: None)
    AgentPolicy(agent, explore=True, acting=beside.acting)(IMAGES[:, 0].numpy(), np.ones(3, bool))
    assert agent.updates == 0
    played.set()
    beside.wait()
    assert agent.updates == 1


def test_an_update_that_fails_is_told(updates: Callable[..., Updates]) -> None:
    beside = updates(learner())
    beside.begin({}, lambda metrics: None)
    with pytest.raises(KeyError, match="image"):
        beside.begin(make_batch(), lambda metrics: None)


def test_the_backend_in_force_is_the_threads_too(updates: Callable[..., Updates]) -> None:
    from apv_fast.backend import requested, use_backend

    backends: list[str] = []
    with use_backend("reference"):
        beside = updates(learner())
        beside.begin(make_batch(), lambda metrics: backends.append(requested(None)))
        beside.wait()
    assert backends == ["reference"]


# One graph a step


class Recording(RecordingGraph):
    """Puts back what recording drew from a generator."""

    def __init__(self, state: Callable[[], Iterable[Tensor]], generator: torch.Generator | None) -> None:
        super().__init__(state)
        self.generator, self.recorded = generator, 0

    def record(self, work: Callable[[], object]) -> Callable[[], None]:
        state = None if self.generator is None else self.generator.get_state()
        replay = super().record(work)
        if self.generator is not None and state is not None:
            self.generator.set_state(state)
        self.recorded += 1
        return replay


@pytest.mark.gpu
@pytest.mark.parametrize("own", [True, False], ids=["own generator", "torch's"])
@pytest.mark.parametrize("kind", ["stacked", "plain", "gaussian", "bf16"])
def test_a_step_is_one_graph(kind: str, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same actions and memory as without, through new weights, a memory from elsewhere, and another start."""
    monkeypatch.setattr(noise, "seeded", lambda *_: False)  # by operations that can be recorded
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = []
    for graphed in (False, True):
        torch.manual_seed(0)
        config = replace(VARIANTS[kind], backend="auto" if device.type == "cuda" else "reference")
        agent = Agent(config, 2, discrete=False, device=device)
        acting = agent.acting.copy()
        generator = torch.Generator(device).manual_seed(4) if own else None
        options: dict[str, Any] = {}
        if graphed:
            options = {"graph": "on"}
            if device.type == "cpu":
                options["recorder"] = Recording(lambda: policy._changed(), generator)  # noqa: B023
        policy = AgentPolicy(agent, explore=True, generator=generator, acting=acting, **options)
        torch.manual_seed(1)
        actions = []
        for step in range(6):
            if step == 2:
                agent.acting.actor.out.bias.data.add_(1.0)
                acting.take(agent.acting)
            if step == 4:
                policy.remember(copy.deepcopy(policy.memory))
            if step == 5:
                policy.forget()
            first = np.array([step == 0, False, step == 3])
            actions.append(policy(IMAGES[:, step].numpy(), first).copy())  # a replay writes to the same memory
        assert policy.memory is not None
        results.append((actions, [tensor.clone() for tensor in policy.memory.tensors()], torch.rand(2)))
        if graphed:
            assert policy.run.description == "one CUDA graph an acting step"
            assert device.type == "cuda" or options["recorder"].recorded == 2, "anew where the memory was replaced"
    (one, memory, after), (other, memory_too, after_too) = results
    np.testing.assert_array_equal(np.stack(one), np.stack(other))
    assert all(map(torch.equal, memory, memory_too)) and torch.equal(after, after_too)
    assert not np.array_equal(one[1], one[2])


# A GPU's side, against streams that write down who waits for whom


def test_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy comes between two updates, after the last step has read the old weights, and before the next step."""
    calls: list[str] = []

    class Stream:
        def __init__(self, device: Any = None, priority: int = 0) -> None:
            self.name = "update's" if priority == 0 else "acting's"

        def wait_stream(self, other: Stream) -> None:
            calls.append(f"{self.name} waits for {other.name}")

    current = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch, "Generator", lambda device: types.SimpleNamespace(manual_seed=lambda seed: f"of {seed}"))
    acting = types.SimpleNamespace(copy=lambda: types.SimpleNamespace(take=lambda other: calls.append("copy")))
    agent: Any = types.SimpleNamespace(
        device=torch.device("cuda"), acting=acting, updates=0, update=lambda batch: calls.append(f"update {batch}")
    )
    one: Any = Updates(agent, overlap=True, seed=3)
    assert one.generator == "of 3" and calls == ["acting's waits for update's"]
    calls.clear()
    for batch in ("1", "2"):
        one.begin(batch, lambda metrics: None)
        order = ["update's waits for acting's", "copy", "acting's waits for update's", f"update {batch}"]
        assert calls == order
        calls.clear()
    one.close()


# Whole runs


def run_of(out: Path, **changes: Any) -> Path:
    finetune(replace(CORRIDOR, out=out, **changes))
    return out


def left_by(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Everything that decides how a run goes on, and its metrics; nothing that has the time in it."""
    path = latest_checkpoint(run / "checkpoints")
    assert path is not None
    state = load_checkpoint(path)[1]
    state["replay"] |= {"episodes": len(state["replay"]["episodes"])}
    lines = read_metrics(run / "metrics.jsonl")
    return state, [{key: value for key, value in line.items() if key != "time"} for line in lines]


def assert_same(one: Path, other: Path) -> None:
    (state, lines), (state_too, lines_too) = left_by(one), left_by(other)
    assert differing(state, state_too) == []
    assert lines == lines_too


class Slow:
    """Makes every n-th call wait."""

    def __init__(self, function: Callable[..., Any], seconds: float, every: int) -> None:
        self.function, self.seconds, self.every, self.calls = function, seconds, every, 0

    def __get__(self, instance: Any, owner: Any) -> Callable[..., Any]:
        return types.MethodType(self, instance)

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls % self.every == 0:
            time.sleep(self.seconds)
        return self.function(*arguments)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("overlap") / "run")


@pytest.mark.parametrize("slow", ["updates", "environments"])
def test_what_takes_how_long_changes_nothing(
    slow: str, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if slow == "updates":
        monkeypatch.setattr(Agent, "update", Slow(Agent.update, 0.15, 2))
    else:
        monkeypatch.setattr(Corridor, "step", Slow(Corridor.step, 0.03, 3))
    assert_same(undisturbed, run_of(tmp_path / "run"))


def test_who_plays_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the thread that learns, which comes to it sooner or later."""
    drew: list[int] = []
    sample = Replay.sample

    def noted(replay: Replay, batch_size: int) -> dict[str, Tensor]:
        drew.append(threading.get_ident())
        return sample(replay, batch_size)

    monkeypatch.setattr(Replay, "sample", noted)
    run_of(tmp_path / "run", steps=40)
    assert len(drew) > 3 and set(drew) == {threading.get_ident()}


def test_a_thread_changes_nothing(undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Now:
        """Instead of a thread: all is done when it is asked for."""

        def __init__(self, *arguments: Any) -> None:
            pass

        def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
            result = function(*arguments)
            return types.SimpleNamespace(result=lambda: result)

        def shutdown(self) -> None:
            pass

    monkeypatch.setattr(overlap_module, "ThreadPoolExecutor", Now)
    assert_same(undisturbed, run_of(tmp_path / "run"))


def test_overlap_is_another_run(undisturbed: Path, tmp_path: Path) -> None:
    """Else nothing here would be tested."""
    without = run_of(tmp_path / "run", overlap=False)
    assert differing(left_by(without)[0]["agent"], left_by(undisturbed)[0]["agent"])
    assert left_by(without)[0]["acting"] is None


@pytest.mark.parametrize("step", [9, 40, 48])
def test_a_resumed_run_has_the_same_bits(step: int, undisturbed: Path, tmp_path: Path) -> None:
    """From checkpoints in the prefill, on an update's clock, and between two. The other run writes none on the way.

    The environment's actions are numbers, so weights that differ in any bit give another run.
    """
    run = run_of(tmp_path / "run", steps=step)
    run_of(run, resume=True)
    (state, _), (resumed, _) = left_by(undisturbed), left_by(run)
    assert differing(state, resumed) == []


def test_a_checkpoint_waits_for_the_update(undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is begun in the very step after which it is written, and is slow; the run goes on from there alike."""
    monkeypatch.setattr(Agent, "update", Slow(Agent.update, 0.2, 1))
    run = run_of(tmp_path / "run", checkpoint_every=15)
    last = latest_checkpoint(run / "checkpoints")
    assert last is not None and last.stem.endswith("60")
    last.unlink()
    before = latest_checkpoint(run / "checkpoints")
    assert before is not None and before.stem.endswith("55") and (55 - CORRIDOR.prefill) % CORRIDOR.train_every == 0
    run_of(run, resume=True)
    assert_same(undisturbed, run)


def test_two_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = run_of(tmp_path / "one", envs=2, eval_episodes=1)
    monkeypatch.setattr(Agent, "update", Slow(Agent.update, 0.1, 2))
    assert_same(one, run_of(tmp_path / "two", envs=2, eval_episodes=1))


def test_the_flags(tmp_path: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--env", "dmc:walker-walk", "--out", str(tmp_path / "run")]
    assert parse("finetune", [*command, "--overlap"]).overlap is True
    assert parse("finetune", [*command, "--no-overlap"]).overlap is False
    assert main(["finetune", "--resume", "--out", str(undisturbed), "--no-overlap"]) == 1
    assert "overlap is true there and false now" in capsys.readouterr().err

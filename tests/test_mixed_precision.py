"""Copies of weights in the products' dtype: always what a cast would give, whoever changed the weight."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from apv_fast import backend
from apv_fast.agent import Agent, Pretrainer
from apv_fast.agent.cuda_graph import GraphedUpdate
from apv_fast.backend import probe
from apv_fast.mixed_precision import _copies, cast, keep_copy, mark_written, refresh_copies
from apv_fast.ops import noise
from apv_fast.optim import KerasAdam
from tests.support.learners import CPU, FINETUNE, MODEL, PRETRAIN, differing, make_batch
from tests.support.recording_graph import RecordingGraph

NARROW = torch.bfloat16
triton = pytest.mark.skipif(
    not probe("triton").available or torch.cuda.is_available(), reason="needs Triton's interpreter"
)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))))


def changes(p: nn.Parameter) -> Iterator[str]:
    """Ways in which something else than a step changes a weight."""
    with torch.no_grad():
        p.add_(1)
        yield "in place"
        torch.where(torch.tensor(True), p + 1, p, out=p)
        yield "as an output"
        p.view(-1)[1] = 7
        yield "through a view"
    p.data = p.data + 3
    yield "other memory"
    holder = nn.Module()
    holder.p = p
    holder.load_state_dict({"p": torch.full_like(p, 1.2345678)})
    yield "load_state_dict"


def test_a_copy_is_never_stale() -> None:
    p = weight(3, 5)
    narrow = keep_copy(p, NARROW)
    for how in changes(p):
        assert torch.equal(cast(p, NARROW), p.to(NARROW)), how
        assert cast(p, NARROW).data_ptr() == narrow.data_ptr()  # where a recorded update reads it
    for how in changes(p):
        refresh_copies([p])
        assert torch.equal(narrow, p.to(NARROW)), how


def test_without_a_copy_it_is_a_cast() -> None:
    p, other = weight(4), weight(4)
    narrow = keep_copy(p, NARROW)
    assert cast(p, torch.float16).dtype == torch.float16 and cast(p, torch.float32) is p
    for one in (other, copy.deepcopy(p)):
        assert cast(one, NARROW).data_ptr() != narrow.data_ptr() and torch.equal(cast(one, NARROW), one.to(NARROW))


def test_gradients_are_those_of_a_cast() -> None:
    p = weight(3, 5)
    keep_copy(p, NARROW)
    x = torch.randn(7, 5).to(NARROW)
    grads = [torch.autograd.grad((x @ w.T).float().square().sum(), p)[0] for w in (cast(p, NARROW), p.to(NARROW))]
    assert grads[0].dtype == torch.float32 and torch.equal(*grads)
    assert not cast(p.requires_grad_(False), NARROW).requires_grad


def test_a_change_before_the_backward_pass_is_noticed() -> None:
    p = weight(3, 5)
    keep_copy(p, NARROW)
    x = torch.randn(7, 5).to(NARROW).requires_grad_()
    y = (x @ cast(p, NARROW).T).sum()
    with torch.no_grad():
        p.add_(1)
    refresh_copies([p])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_compilation_sees_a_cast() -> None:
    p = weight(3, 5)
    keep_copy(p, NARROW)
    compiled = torch.compile(lambda: cast(p, NARROW).sum(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), p.to(NARROW).sum())
    torch.compiler.reset()


@triton
def test_the_step_writes_copies() -> None:
    """Of more than a chunk, unaligned, without a gradient, of any strides; beside weights without one."""
    leaves = [weight(70, 70), weight(5), weight(3), weight(6, 4), nn.Parameter(weight(8, 4).detach().T)]
    adam = KerasAdam(leaves, 0.05, backend="triton", copies={p: NARROW for p in leaves if len(p) != 6})
    copies = [one for one in adam._copies if one is not None]
    assert len(copies) == 4
    for t in range(3):
        for p in (*leaves[:2], *leaves[3:]):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
        adam.step()
        having = [p for p in leaves if len(p) != 6]
        assert all(torch.equal(one, p.to(NARROW)) for one, p in zip(copies, having, strict=True))
        versions = [one._version for one in copies]
        assert all(torch.equal(cast(p, NARROW), p.to(NARROW)) for p in having)
        assert versions == [one._version for one in copies], "nothing had to be written again"


@triton
def test_a_step_before_the_backward_pass_is_noticed() -> None:
    p = weight(3, 5)
    adam = KerasAdam([p], 0.05, backend="triton", copies={p: NARROW})
    p.grad = torch.ones_like(p)
    y = (torch.randn(7, 5).to(NARROW).requires_grad_() @ cast(p, NARROW).T).sum()
    adam.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@triton
def test_the_copy_of_an_optimiser_leaves_ours_alone() -> None:
    p = weight(5)
    adam = KerasAdam([p], 0.05, backend="triton", copies={p: NARROW})
    twin = copy.deepcopy(adam)
    (other,) = twin.param_groups[0]["params"]
    other.grad = torch.ones(5)
    twin.step()
    assert torch.equal(cast(p, NARROW), p.to(NARROW)) and torch.equal(cast(other, NARROW), other.to(NARROW))
    assert not torch.equal(p, other)


def test_backends_that_cannot_write_copies_have_none() -> None:
    p = weight(5)
    adam = KerasAdam([p], backend="reference", copies={p: NARROW})
    assert adam._copies == [None] and cast(p, NARROW).data_ptr() != cast(p, NARROW).data_ptr()


def test_writers_say_so() -> None:
    p = weight(2)
    narrow = keep_copy(p, NARROW)
    with torch.no_grad():
        p.add_(1)
        narrow.fill_(5)
    mark_written([p])
    assert cast(p, NARROW).tolist() == [5, 5]


class Casts(TorchDispatchMode):
    """Counts casts of weights."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory, self.count = {p.untyped_storage()._cdata for p in weights}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten._to_copy:
            self.count += args[0].dtype == torch.float32 and args[0].untyped_storage()._cdata in self.memory
        return func(*args, **(kwargs or {}))


@pytest.fixture
def step_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything by the reference, whose bfloat16 Triton's interpreter lacks, but the optimiser."""
    monkeypatch.setitem(backend.IMPLEMENTATIONS["keras_adam"], "reference", "apv_fast.kernels.keras_adam:Step")
    monkeypatch.setattr(noise, "seeded", lambda *_: False)  # what C++ writes into memory cannot be recorded


def learner(kind: str, *, copied: bool = True) -> Any:
    torch.manual_seed(0)
    config: Any = PRETRAIN if kind == "video" else FINETUNE
    config = replace(config, model=replace(MODEL, precision="bf16"), backend="reference", graph="off")
    one = Pretrainer(config, CPU) if kind == "video" else Agent(config, 2, discrete=False, device=CPU)
    if not copied:
        for optimizer in [one.optimizer] if isinstance(one, Pretrainer) else one.optimizers.values():
            for p in optimizer.param_groups[0]["params"]:
                _copies.pop(p, None)
    return one


@triton
@pytest.mark.parametrize("kind", ["video", "task"])
def test_updates_are_those_of_casts(kind: str, step_of_triton: None) -> None:
    """Bit for bit: eager with copies, recorded with copies, and without any, a weight being changed in between."""
    ways = {"cast": learner(kind, copied=False), "copies": learner(kind), "recorded": learner(kind)}
    one = ways["recorded"]
    one.run = GraphedUpdate(one.learn, one.tensors, CPU, "on", RecordingGraph(one.tensors), ready=one.run._ready)
    for one in ways.values():
        torch.manual_seed(1)
        for t in range(4):
            one.update(make_batch(t))
            if t == 1:
                with torch.no_grad():
                    one.model.rssm.gru.weight.mul_(1.5)
    for way in ("copies", "recorded"):
        assert differing(ways["cast"].state_dict(), ways[way].state_dict()) == [], way


@triton
@pytest.mark.parametrize(("kind", "before", "after"), [("video", 32, 18), ("task", 100, 24)])
def test_casts_of_weights_in_an_update(kind: str, before: int, after: int, step_of_triton: None) -> None:
    """What is left: 18 of convolutions and the decoder's dense layer, and in the task's update 6 of the slow critic."""
    for copied, expected in ((False, before), (True, after)):
        one = learner(kind, copied=copied)
        one.update(make_batch())
        with Casts(list(one.tensors())) as casts:
            one.update(make_batch())
        assert casts.count == expected

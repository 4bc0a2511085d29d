"""PyTorch's own rivals of the scans and updates, compiled and as its scan, are the reference."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("bench", reason="bench/ is not installed; it runs from a checkout")
from apv_fast import ops
from apv_fast.agent.agent import Agent
from apv_fast.agent.behavior import ImaginationNoise
from apv_fast.agent.world_model import StackNoise
from apv_fast.backend import use_backend
from apv_fast.nn import RSSM, Actor, StackedRSSM
from apv_fast.ops import Latent
from bench.cases.updates import finetune_setup
from bench.rivals import compiled, hoisted, scanned
from tests.support.rssm_cases import Sizes, make_problem, params_of

CPU = torch.device("cpu")

LENGTH = 10  # two iterations of a scan; with it inductor has put one gradient into another's memory


class Filtering:
    """A problem of the rivals in float64, with the reference's outputs and gradients."""

    def __init__(self) -> None:
        sizes = Sizes(3, LENGTH, 5, 2, 3, 7, 6, 2, 5)
        tensors = make_problem(sizes, torch.float64)
        params, self.latent = params_of(tensors), Latent(sizes.stoch, sizes.discrete)
        self.leaves = [x.requires_grad_() for x in (*params, tensors["embed"], tensors["action"])]
        self.noise = (tensors["post_noise"], tensors["prior_noise"])
        self.inputs = (params, tensors["embed"], tensors["is_first"], tensors["action"])
        self.start = hoisted.zeros(params, self.latent, sizes.batch)
        post, prior = ops.rssm_observe(*self.inputs, latent=self.latent, noise=self.noise, backend="reference")
        self.expected = [post["deter"], post["stoch"], post["logit"], prior["stoch"], prior["logit"]]

    def check(self, got: Sequence[torch.Tensor]) -> None:
        """Values and gradients agree to float64's rounding."""
        generator = torch.Generator().manual_seed(0)
        cotangents = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in self.expected]
        for x, y in zip(got, self.expected, strict=True):
            torch.testing.assert_close(x, y)
        gradients = [torch.autograd.grad(outputs, self.leaves, cotangents) for outputs in (got, self.expected)]
        for x, y in zip(*gradients, strict=True):
            torch.testing.assert_close(x, y)


def test_the_compiled_rival_is_the_reference() -> None:
    """Hoisting changes neither values nor gradients, and all steps are one compiled function."""
    problem = Filtering()
    graphs: list[object] = []

    def count(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    step = torch.compile(hoisted.step, backend=count, dynamic=False, fullgraph=True)
    got = hoisted.observe(step, *problem.inputs, problem.latent, *problem.noise)
    assert len(graphs) == 1
    problem.check(got)
    torch.compiler.reset()


@pytest.mark.parametrize(
    "backend", ["", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)], ids=lambda name: name or "eager"
)
def test_the_scanning_rival_is_the_reference(backend: str) -> None:
    """Values and gradients of the loop, through PyTorch's own scan."""
    problem = Filtering()
    observe: Any = scanned.compiled(scanned.observe, backend) if backend else scanned.observe
    problem.check(observe(*problem.inputs, problem.latent, *problem.noise, problem.start))
    torch.compiler.reset()


def test_a_scan_does_several_steps_an_iteration() -> None:
    assert [scanned.unrolled(length) for length in (50, 25, 15, 16, 13, 1)] == [5, 5, 5, 8, 1, 1]


def _wrong(body: Any, carry: Any, xs: Any, most: int = 0, *, what: str) -> Any:
    rows = []
    for t in range(len(xs[0])):
        carry, ys = body(carry, tuple(x[t] for x in xs))
        if what == "gradients":  # of the carry
            carry = tuple(x.detach() for x in carry)
        rows.append(tuple(y + (what == "values") for y in ys))
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


@pytest.mark.parametrize("what", ["values", "gradients"])
def test_a_scan_that_is_wrong_is_noticed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanned, "scan", functools.partial(_wrong, what=what))
    with pytest.raises(scanned.ScanError, match=f"scan gives wrong {what}"):
        scanned.check.__wrapped__()


def test_a_scan_that_is_missing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch._higher_order_ops.scan", None)
    with pytest.raises(scanned.ScanError, match=r"has no torch\._higher_order_ops\.scan"):
        scanned.check.__wrapped__()


def test_this_versions_scan_can_be_used() -> None:
    scanned.check()


@pytest.mark.thorough
@pytest.mark.parametrize("concat_embed", [False, True])
def test_scans_in_place_of_an_updates_loops_are_the_reference(concat_embed: bool) -> None:
    """Both models stacked, then a roll-out with the actor from where they are; gradients of all weights that learn."""
    torch.manual_seed(0)
    lower = RSSM(5, deter=4, hidden=5, stoch=2, discrete=3, action_pad=3, dtype=torch.float64)
    width = lower.feat_dim + concat_embed * 5
    upper = RSSM(width, 2, deter=4, hidden=5, stoch=2, discrete=3, action_pad=3, dtype=torch.float64)
    actor = Actor(upper.feat_dim, 2, layers=1, units=4, dtype=torch.float64)
    embed, action = torch.randn(2, 4, 5, dtype=torch.float64), torch.rand(2, 4, 2, dtype=torch.float64) * 2 - 1
    shapes = [(2, 4, 2)] * 4 + [(4, 8, 2)]  # a horizon of 4 from 8 states
    noise = [100.0 * torch.nn.functional.one_hot(torch.randint(3, shape), 3).double() for shape in shapes]
    uniforms = torch.rand(4, 8, 2, dtype=torch.float64)
    is_first = torch.tensor([[True, False, False, False], [False, False, True, False]])

    def run() -> list[torch.Tensor]:
        states = StackedRSSM(lower, upper, concat_embed=concat_embed).observe(
            embed, is_first, action, af_noise=(noise[0], noise[1]), noise=(noise[2], noise[3])
        )
        start = {name: x.detach().flatten(0, 1) for name, x in states["post"].items()}
        after, actions = ops.rssm_rollout(
            upper.params(), actor.params(), start, horizon=4, latent=upper.latent, min_std=0.3, noise=noise[4],
            action_noise=uniforms,
        )  # fmt: skip
        return [x for name in sorted(states) for x in states[name].values()] + [*after.values(), actions]

    weights = [*lower.parameters(), *upper.parameters(), *actor.parameters()]
    with use_backend("reference"):
        expected = run()
        with compiled.scans():
            got = run()
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y)
    sums = [sum((i + 1) * x.sin().sum() for i, x in enumerate(outputs)) for outputs in (got, expected)]
    for x, y in zip(*(torch.autograd.grad(total, weights) for total in sums), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(x, y)


def _losses(agent: Agent, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """One update with noise that decides every sample; the losses."""
    rows, latent, horizon = batch["reward"].numel(), agent.model.rssm.latent, agent.config.behavior.horizon
    generator = torch.Generator().manual_seed(3)

    def decided(*leading: int) -> torch.Tensor:
        classes = torch.randint(latent.discrete, (*leading, latent.stoch), generator=generator)
        return 100.0 * torch.nn.functional.one_hot(classes, latent.discrete).float()

    both = [(decided(*batch["reward"].shape), decided(*batch["reward"].shape)) for _ in range(2)]
    model = agent.model.loss(batch, StackNoise(*both))
    agent._step(model.loss, "model", "video")
    uniforms = torch.rand(horizon, rows, 4, generator=generator)
    noise = ImaginationNoise(decided(horizon, rows), uniforms)
    actor, critic, _ = agent.behavior.losses(agent.model, model.post, batch["is_terminal"], noise)
    agent._step(actor + critic, "actor", "critic")
    return [model.loss, actor, critic]


def small_agents(count: int) -> tuple[dict[str, torch.Tensor], list[Agent]]:
    """A batch, and agents with the same weights."""
    batch, config = finetune_setup(CPU, torch.float32, B=1, T=6, horizon=2, deter=6, hidden=5, cnn_depth=1)
    config = replace(config, backend="reference", graph="off")
    config = replace(config, model=replace(config.model, stoch=2, discrete=3))
    torch.manual_seed(0)
    agents = [Agent(config, 4, discrete=False, device=CPU) for _ in range(count)]
    with torch.no_grad():
        for other in agents[1:]:
            for x, y in zip(other.tensors(), agents[0].tensors(), strict=True):
                x.copy_(y)
    return batch, agents


@pytest.mark.thorough
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_compiled_update_is_the_references(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, gradients, and the weights after a step of Adam; from two graphs of losses and one of each optimiser."""
    batch, agents = small_agents(2)
    graphs: list[str] = []
    compile_ = torch.compile

    def counted(function: Any, **options: Any) -> Any:
        if options.get("backend") != backend:  # PyTorch's own scan, when it is first looked at
            return compile_(function, **options)
        del options["backend"]
        assert options["fullgraph"]
        name = getattr(function, "__name__", type(function).__name__)
        compiler = torch._dynamo.lookup_backend(backend)

        def count(graph: Any, example: Any, **more: Any) -> Any:
            graphs.append(name)
            return compiler(graph, example, **more)

        return compile_(function, backend=count, **options)

    if backend == "eager":
        monkeypatch.setattr(torch, "compile", counted)
    compiled.compile_update(agents[1], backend)
    expected, got = (_losses(agent, batch) for agent in agents)
    if backend == "eager":
        assert len(graphs) == 2 + len(agents[1].optimizers) and graphs.count("loss") == graphs.count("losses") == 1
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    for x, y in zip(agents[1].tensors(), agents[0].tensors(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    # Of the world model these are of its own loss still: the actor's has none for it.
    for module in ("model", "behavior"):
        weights = zip(*(getattr(agent, module).parameters() for agent in reversed(agents)), strict=True)
        for x, y in weights:
            assert (x.grad is None) == (y.grad is None)
            if y.grad is not None:
                torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-4)
    torch.compiler.reset()


@pytest.mark.thorough
def test_a_compiled_update_makes_noise_of_its_own() -> None:
    """As it is timed: whole updates, without noise from outside."""
    batch, agents = small_agents(2)
    compiled.compile_update(agents[1], "eager")
    for _ in range(2):
        right, losses = (agent.update(batch) for agent in agents)
        assert losses.keys() == right.keys() and all(x.isfinite() for x in losses.values())
        assert float(losses["image_loss"]) == pytest.approx(float(right["image_loss"]), rel=0.02)
    torch.compiler.reset()

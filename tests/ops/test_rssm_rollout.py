"""``rssm_rollout`` on every backend: imagination with the actor in the loop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from apv_fast import ops
from apv_fast.backend import probe
from apv_fast.nn import RSSM, Actor
from apv_fast.ops.op import Op
from tests.ops.rssm_rollout_problems import BACKENDS, CASES, DTYPES, Case, assert_exact, make, rollout, run
from tests.support.rssm_errors import relative_errors


@pytest.mark.statistical
@pytest.mark.interpreted("odd")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients(backend: str, case: Case, dtype: torch.dtype) -> None:
    assert_exact(backend, case, dtype)


@pytest.mark.parametrize("discrete", [False, True], ids=["continuous", "one-hot"])
@pytest.mark.parametrize("latent", [4, 0], ids=["categorical", "gaussian"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_the_actor_and_the_model_step_by_step(backend: str, latent: int, discrete: bool) -> None:
    """What behaviour learning did before there was an op: modules, one step at a time."""
    device = probe(backend).devices[-1]
    torch.manual_seed(0)
    model = RSSM(2, 3, deter=6, hidden=5, stoch=3, discrete=latent, action_pad=4).to(device).requires_grad_(False)
    actor = Actor(model.feat_dim, 3, discrete=discrete, layers=2, units=7).to(device)
    start = {key: torch.rand_like(x) for key, x in model.initial(2).items()}
    noise = ops.sample_noise(model.latent, 3, 2, dtype=torch.float32, device=torch.device(device))
    action_noise = torch.rand(3, 2, 3, device=device)
    state, expected = start, []
    for t in range(3):
        action = actor(model.feat(state).detach()).rsample(action_noise[t])
        state = model.img_step(state, action, noise=noise[t])
        expected.append({**state, "action": action})
    states, actions = ops.rssm_rollout(
        model.params(), actor.params(), start, horizon=3, latent=model.latent, min_std=actor.min_std, noise=noise,
        action_noise=action_noise, backend=backend,
    )  # fmt: skip
    for key, x in {**states, "action": actions}.items():
        torch.testing.assert_close(x, torch.stack([each[key] for each in expected]), atol=2e-6, rtol=2e-6)
    weights = list(actor.parameters())
    losses = (
        torch.cat([states["deter"], actions], -1),
        torch.stack([torch.cat([e["deter"], e["action"]], -1) for e in expected]),
    )
    got, wanted = (torch.autograd.grad(loss.square().sum(), weights) for loss in losses)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=5e-6, rtol=5e-5)


@pytest.mark.parametrize("name", ["odd", "one-hot actions", "gaussian"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_seed_stands_for_its_noise(backend: str, name: str) -> None:
    case = CASES[name]
    tensors = make(case, torch.float64, device=probe(backend).devices[-1])
    seeds = [torch.tensor(seed, device=tensors["deter"].device) for seed in (3, -(2**40))]
    seeded = {"noise": seeds[0], "action_noise": seeds[1]}
    got, expected = (run(tensors | seeded, case, each) for each in (backend, "reference"))
    assert (
        max(relative_errors(got, expected).values()) < 1e-6
    )  # float32 noise, whose logarithms differ in the last digit
    assert not torch.equal(got["action"], run(tensors, case, backend)["action"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_world_models_weights_are_constants(backend: str) -> None:
    tensors = make(CASES["odd"], torch.float64, device=probe(backend).devices[-1])
    weights = {name: x.requires_grad_() for name, x in tensors.items() if name.startswith("params.")}
    assert not rollout(tensors, CASES["odd"], backend)["deter"].requires_grad
    tensors["deter"].requires_grad_()
    rollout(tensors, CASES["odd"], backend)["logit"].sum().backward()
    assert tensors["deter"].grad is not None
    assert all(x.grad is None for x in weights.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients_the_same_numbers(backend: str) -> None:
    case = CASES["odd"]
    tensors = make(case, torch.float32, device=probe(backend).devices[-1])
    expected = run(tensors, case, backend)
    for name, x in rollout(tensors, case, backend).items():
        assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("output", ["deter", "stoch", "logit", "action"])
def test_losses_that_read_one_output(backend: str, output: str) -> None:
    case = CASES["odd"]
    tensors = make(case, torch.float64, device=probe(backend).devices[-1])
    gradients = []
    for name in (backend, "reference"):
        leaves = {key: x.detach().requires_grad_() for key, x in tensors.items() if key.startswith("actor")}
        loss = rollout(tensors | leaves, case, name)[output].pow(3).sum()
        gradients.append(dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)))
    assert max(relative_errors(*gradients).values()) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: str) -> None:
    case = CASES["odd"]
    tensors = make(case, torch.float64, device=probe(backend).devices[-1])

    def spaced(x: Tensor) -> Tensor:
        wide = x.new_zeros([2 * size for size in reversed(x.shape)])
        return wide.permute(*reversed(range(x.dim())))[tuple(slice(None, None, 2) for _ in x.shape)].copy_(x)

    errors = relative_errors(
        run({k: spaced(x) for k, x in tensors.items()}, case, backend), run(tensors, case, backend)
    )
    assert max(errors.values()) < 1e-12, errors


@pytest.mark.parametrize("backend", BACKENDS)
def test_drawn_noise_follows_the_generator(backend: str) -> None:
    case = CASES["odd"]
    device = probe(backend).devices[-1]
    tensors = make(case, torch.float32, device=device)
    drawn = {"noise": None, "action_noise": None}

    def action(seed: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        return rollout(tensors, case, backend, **drawn, generator=generator)["action"]

    first = action(1)
    assert torch.equal(first, action(1))
    assert not torch.equal(first, action(2))
    assert first.abs().max() < 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(CASES["odd"], sizes=replace(CASES["odd"].sizes, length=1, batch=2), layers=1)
    tensors = make(case, torch.float32, device=probe(backend).devices[-1])
    leaves = {n: x.requires_grad_() if n.startswith(("actor", "deter")) else x for n, x in tensors.items()}
    overload, run = torch.ops.apv_fast.rssm_rollout.default, Op.__call__
    calls: list[tuple[object, ...]] = []

    def record(self: Op[Any, Any], call: Any, backend: str | None) -> object:
        calls.append((*self.signature.flatten(call), backend or ""))
        return run(self, call, backend)

    with monkeypatch.context() as patch:
        patch.setattr(Op, "__call__", record)
        rollout(leaves, case, backend)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(overload, calls[0], test_utils=utilities)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_break(backend: str) -> None:
    """The same result, also for another number of rows, which torch.compile makes symbolic."""
    compiled = torch.compile(rollout, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        case = replace(CASES["odd"], sizes=replace(CASES["odd"].sizes, length=2, batch=batch), layers=1)
        tensors = make(case, torch.float32, device=probe(backend).devices[-1])
        expected = rollout(tensors, case, backend)
        for key, x in compiled(tensors, case, backend).items():
            torch.testing.assert_close(x, expected[key], msg=key)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"horizon": 0}, ValueError, "horizon is 0; it must be at least 1"),
        ({"noise": torch.zeros(2, 3, 3, 7)}, ValueError, r"noise has shape \(2, 3, 3, 7\); it must be \[T, N, S, C\]"),
        ({"action_noise": torch.zeros(3, 3, 1)}, ValueError, r"action_noise has shape \(3, 3, 1\)"),
        ({"noise": torch.tensor(3.0)}, ValueError, r"noise has shape \(\)"),
        ({"actor.00": torch.zeros(5, 4)}, ValueError, r"actor.trunk\[0\] has shape \(5, 4\)"),
        ({"actor.head1": torch.zeros(3, 5)}, ValueError, r"actor.std_weight has shape \(3, 5\)"),
        ({"actor.head0": torch.zeros(2, 5).double()}, TypeError, "actor.out_weight has dtype torch.float64"),
        ({"deter": torch.zeros(3, 8)}, ValueError, r"state\['deter'\] has shape \(3, 8\)"),
    ],
)
def test_a_bad_argument_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    tensors = make(CASES["odd"], torch.float32)
    direct = {name: x for name, x in changes.items() if name not in tensors or "noise" in name}
    with pytest.raises(error, match=f"rssm_rollout: {message}"):
        rollout(tensors | {k: x for k, x in changes.items() if k in tensors}, CASES["odd"], None, **direct)


def test_an_actor_wider_than_the_pad_is_an_error() -> None:
    tensors = make(CASES["odd"], torch.float32)
    tensors |= {"actor.head0": torch.zeros(4, 5), "actor.head0 bias": torch.zeros(4)}
    tensors |= {"actor.head1": torch.zeros(4, 5), "actor.head1 bias": torch.zeros(4)}
    with pytest.raises(ValueError, match="the actor has 4 actions; the model pads actions to 3, so at most 3"):
        rollout(tensors, CASES["odd"], None, action_noise=torch.zeros(3, 3, 4))

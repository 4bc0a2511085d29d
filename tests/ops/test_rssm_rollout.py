"""Imagination with the actor in the loop, on every backend that has it; and the Triton products that it consists of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apv_fast import ops
from apv_fast.backend import IMPLEMENTATIONS, probe
from apv_fast.nn import RSSM, Actor
from apv_fast.ops import ActorParams, Latent, RSSMParams
from apv_fast.ops.op import Op
from apv_fast.reference.noise import gumbel_noise, normal_noise
from tests.ops.test_rssm_observe import REFERENCE_ERROR, relative_errors
from tests.support.rssm_cases import (
    Sizes,
    Tensors,
    backends_of,
    flat,
    imagine,
    make_params,
    make_problem,
    params_of,
    step,
)
from tests.support.yardstick import judge, least, seed_of, yardsticks

BACKENDS = [name for name in IMPLEMENTATIONS["rssm_rollout"] if probe(name).available]
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """A model, an actor and a roll-out; ``sizes.batch`` start states, ``sizes.length`` steps."""

    sizes: Sizes
    discrete: bool = False
    layers: int = 2
    units: int = 5


CASES = {
    "odd": Case(Sizes(3, 3, 1, 2, 3, 9, 5, 3, 7)),
    "one-hot actions": Case(Sizes(2, 3, 1, 3, 4, 7, 6, 2, 4), discrete=True),
    "gaussian": Case(Sizes(2, 3, 1, 1, 2, 5, 4, 3, 0), layers=1),
    "more rows than a tile": Case(Sizes(19, 2, 1, 2, 2, 33, 70, 17, 4), layers=3, units=66),
    "a variable wider than a tile": Case(Sizes(2, 2, 1, 2, 2, 4, 3, 2, 40)),
}


def make(case: Case, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> Tensors:
    """Every tensor by name; noise decides all one-hot samples, whatever the rounding."""
    generator, s = torch.Generator().manual_seed(seed_of(seed)), case.sizes

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def one_hot_noise(*shape: int) -> Tensor:
        return 100.0 * F.one_hot(torch.randint(shape[-1], shape[:-1], generator=generator), shape[-1]).double()

    tensors = {f"params.{name}": w for name, w in make_params(s, generator)._asdict().items()}
    width = s.feat
    for i in range(case.layers):
        tensors |= {
            f"actor.{2 * i:02}": randn(case.units, width) / width**0.5,
            f"actor.{2 * i + 1:02}": randn(case.units),
        }
        width = case.units
    for i in range(1 if case.discrete else 2):
        tensors |= {f"actor.head{i}": randn(s.action, width) / width**0.5, f"actor.head{i} bias": randn(s.action)}
    leading = (s.length, s.batch)
    tensors["deter"] = randn(s.batch, s.deter).tanh()
    tensors["stoch"] = randn(s.batch, s.stoch, s.discrete) if s.discrete else randn(s.batch, s.stoch)
    tensors["noise"] = one_hot_noise(*leading, s.stoch, s.discrete) if s.discrete else randn(*leading, s.stoch)
    uniform = torch.rand(*leading, s.action, generator=generator, dtype=torch.float64)
    tensors["action_noise"] = one_hot_noise(*leading, s.action) if case.discrete else uniform
    return {name: x.to(device, dtype) for name, x in tensors.items()}


def under(tensors: Tensors, prefix: str) -> list[Tensor]:
    return [x for name, x in tensors.items() if name.startswith(prefix)]


def rollout(tensors: Tensors, case: Case, backend: str | None, **changes: Any) -> Tensors:
    """Outputs of the op by name."""
    options: dict[str, Any] = {
        "horizon": case.sizes.length,
        "latent": case.sizes.latent,
        "noise": tensors["noise"],
        "action_noise": tensors["action_noise"],
        "backend": backend,
    }
    states, action = ops.rssm_rollout(
        RSSMParams(*under(tensors, "params.")),
        ActorParams.of(under(tensors, "actor."), case.discrete),
        {"deter": tensors["deter"], "stoch": tensors["stoch"]},
        **options | changes,
    )
    return {**states, "action": action}


def run(tensors: Tensors, case: Case, backend: str) -> Tensors:
    """Outputs, and the gradients of Σ output·cotangent under "grad NAME"."""
    leaves = {
        name: x.detach().requires_grad_() for name, x in tensors.items() if name.startswith(("actor", "deter", "stoch"))
    }
    outputs = rollout(tensors | leaves, case, backend)
    generator = torch.Generator().manual_seed(99)
    loss = torch.zeros((), dtype=torch.float64)
    for name in sorted(outputs):
        cotangent = torch.randn(outputs[name].shape, generator=generator, dtype=torch.float64)
        loss = loss + (outputs[name].double().cpu() * cotangent).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    found = {f"grad {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {name: x.detach() for name, x in outputs.items()} | found


def compare(case: Case, backend: str, dtype: torch.dtype, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """Relative errors of backend and reference in this dtype against a float64 run."""
    tensors = make(case, dtype, seed, probe(backend).devices[-1])
    expected = run({name: x.double() for name, x in tensors.items()}, case, "reference")
    plain = yardsticks(lambda: run(tensors, case, "reference"), backend)
    return relative_errors(run(tensors, case, backend), expected), least(
        relative_errors(own, expected) for own in plain
    )


@pytest.mark.statistical
@pytest.mark.interpreted("odd")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients(backend: str, case: Case, dtype: torch.dtype) -> None:
    assert_exact(backend, case, dtype)


def assert_exact(backend: str, case: Case, dtype: torch.dtype, tiny: bool = False) -> None:
    """Values and gradients, see :func:`tests.support.yardstick.judge`; ``tiny`` as in test_rssm_observe's measure."""

    def measure(seed: int) -> dict[str, tuple[float, float]]:
        got, reference = compare(case, backend, dtype, seed)
        for name, error in () if tiny else reference.items():
            assert error <= REFERENCE_ERROR[dtype], f"reference {name}: {error:.2e}"
        return {name: (error, reference[name]) for name, error in got.items()}

    judge(measure, dtype, exact=backend != "reference")


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


@pytest.mark.parametrize("discrete", [7, 0], ids=["categorical", "gaussian"])
@pytest.mark.parametrize("backend", backends_of("imagine"))
def test_seeds_of_given_actions_and_of_one_step(backend: str, discrete: int) -> None:
    """Batch-first, so a step's noise is not one piece of the whole's."""
    sizes = replace(CASES["odd"].sizes, discrete=discrete)
    tensors = make_problem(sizes, torch.float64, device=probe(backend).devices[-1])
    seed, width = torch.tensor(11, device=tensors["deter"].device), (discrete,) * bool(discrete)
    make_noise = gumbel_noise if discrete else normal_noise
    for call, leading in ((imagine, (sizes.batch, sizes.length)), (step, (sizes.batch, 1))):
        noise = make_noise(seed, *leading, sizes.stoch, *width).double()
        given = call(tensors | {"post_noise": noise, "prior_noise": noise}, sizes, "reference")
        # step() takes step 0 of the noise that it is given, a seed has but one.
        state, action = {key: tensors[key] for key in ("deter", "stoch")}, tensors["action"]
        params, latent = params_of(tensors), sizes.latent
        if call is imagine:
            seeded = flat(prior=ops.rssm_imagine(params, state, action, latent=latent, noise=seed, backend=backend))
        else:
            inputs = (params, state, action[:, 0], tensors["embed"][:, 0], tensors["is_first"][:, 0])
            post, prior = ops.rssm_step(*inputs, latent=latent, noise=seed, backend=backend)
            seeded = flat(post=post, prior=prior)
        assert max(relative_errors(seeded, {key: given[key] for key in seeded}).values()) < 1e-6


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


# The Triton products by themselves, with more tiles in each direction than a roll-out of a few rows has.

DEVICE = probe("triton").devices[-1] if probe("triton").available else ""
needs_triton = pytest.mark.skipif(not DEVICE, reason="Triton cannot run here")


@pytest.fixture
def dense() -> ModuleType:
    pytest.importorskip("triton")
    from apv_fast.kernels.parts import dense

    return dense


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE)


@needs_triton
@pytest.mark.parametrize("columns", [64, 65, 131], ids=lambda n: f"{n} columns")
@pytest.mark.parametrize("rows", [1, 33, 150], ids=lambda n: f"{n} rows")
def test_a_layer(dense: ModuleType, rows: int, columns: int) -> None:
    """Operands in a piece of a row, weights in either order; the activation's argument; nothing written elsewhere."""
    torch.manual_seed(0)
    x, w, bias = randn(rows, 80)[:, 5:75], randn(columns, 70).T.contiguous().T, randn(columns)
    room, keep = randn(rows, columns + 5), torch.empty_like(randn(rows, columns))
    untouched = room[:, columns:].clone()
    dense.dense(room[:, :columns], x, w, bias, elu=True, keep=keep)
    expected = F.linear(x, w, bias)
    torch.testing.assert_close(keep, expected)
    torch.testing.assert_close(room[:, :columns], F.elu(expected))
    assert torch.equal(room[:, columns:], untouched)
    out, gate = torch.empty_like(keep), randn(rows, columns).requires_grad_()
    dense.dense(out, x, w.contiguous(), gate=gate.detach())
    (slope,) = torch.autograd.grad(F.elu(gate).sum(), gate)
    torch.testing.assert_close(out, x @ w.T * slope)


@needs_triton
@pytest.mark.parametrize(("stoch", "classes"), [(5, 1), (11, 7), (9, 32)])
def test_logits_with_their_samples_and_back(dense: ModuleType, stoch: int, classes: int) -> None:
    from apv_fast.kernels.parts.latent import whole

    torch.manual_seed(0)
    latent, rows, width = Latent(stoch, classes), 21, stoch * classes
    assert dense.fits(latent, rows, randn(1))
    x, w, bias, noise = randn(rows, 70), randn(width, 70), randn(width), randn(rows, stoch, classes)
    logit, sample, narrow = (torch.empty_like(randn(rows, width)) for _ in range(3))
    dense.dense_sample(x, w, bias, whole(noise, width), latent, logit, sample, narrow)
    expected = F.linear(x, w, bias)
    torch.testing.assert_close(logit, expected)
    chosen = (expected.view(noise.shape) + noise).argmax(-1)
    assert torch.equal(sample.view(noise.shape), F.one_hot(chosen, classes).double())
    assert torch.equal(sample, narrow)
    of_stoch, own, out = randn(rows, width), randn(rows, width), torch.empty_like(logit)
    dense.dense_softmax(x, w, of_stoch, own, logit, latent, out)
    leaf = logit.requires_grad_()
    probs = leaf.view(noise.shape).softmax(-1).flatten(1)
    (through,) = torch.autograd.grad(probs, leaf, x @ w.T + of_stoch)
    torch.testing.assert_close(out, through + own)


@needs_triton
@pytest.mark.parametrize(("hidden", "deter"), [(70, 65), (3, 130)])
def test_the_grus_backward_product(dense: ModuleType, hidden: int, deter: int) -> None:
    torch.manual_seed(0)
    rows = 19
    grad, w, x, carry = (
        randn(rows, 3 * deter),
        randn(3 * deter, hidden + deter),
        randn(rows, hidden),
        randn(rows, deter),
    )
    out, leaf = torch.empty_like(x), x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.elu(leaf).sum(), leaf)
    both = grad @ w
    expected = carry + both[:, hidden:]
    dense.gru_backward(grad, w, x, out, carry)
    torch.testing.assert_close(out, both[:, :hidden] * slope)
    torch.testing.assert_close(carry, expected)


@needs_triton
def test_extreme_actions_have_finite_gradients() -> None:
    """Saturated heads, and uniforms at both ends: samples inside the bounds, gradients finite."""
    pytest.importorskip("triton")
    from apv_fast.kernels.parts import truncated_normal
    from apv_fast.kernels.parts.latent import whole

    values = torch.tensor([-50.0, -8.0, 0.0, 8.0, 50.0])
    uniforms = torch.tensor([0.0, 2.0**-24, 0.5, 1 - 2.0**-24])
    grid = torch.cartesian_prod(values, values, uniforms).to(DEVICE)
    head, noise = grid[:, :2].contiguous(), grid[:, 2:].contiguous()
    action, gradient = torch.empty_like(noise), torch.empty_like(head)
    truncated_normal.sample(head, whole(noise, 1), 0.1, action, None)
    truncated_normal.sample_backward(torch.ones_like(action), head, whole(noise, 1), 0.1, gradient)
    assert action.abs().max() <= 1 - 1e-6 + 1e-7
    assert gradient.isfinite().all()
    assert gradient.abs().max() <= 2  # an action moves by no more than loc does, and by twice the scale's slope


def test_tiles_do_not_depend_on_the_last_row() -> None:
    """A handful of tiles in all, whatever the number of rows."""
    pytest.importorskip("triton")
    from apv_fast.kernels.parts.tiling import FEW_ROWS, TILES, choose_tile

    for kind in TILES:
        chosen = {choose_tile(rows, columns, kind, 132) for rows in range(1, 3000, 7) for columns in (400, 1024, 3072)}
        assert chosen <= {*TILES[kind], FEW_ROWS[kind]}
        assert choose_tile(2500, 3072, kind, 132) == TILES[kind][0]
        assert choose_tile(1, 3072, kind, 132) == FEW_ROWS[kind]

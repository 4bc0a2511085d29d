"""The policy on every backend that has one of its own: against its modules on the reference."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from apv_fast.agent.policy import ModulePolicy, Policy
from apv_fast.backend import IMPLEMENTATIONS, _implementation, probe, use_backend
from apv_fast.nn import RSSM, Actor
from apv_fast.optim import KerasAdam
from apv_fast.types import State
from tests.support.yardstick import seed_of, yardsticks

ROW = IMPLEMENTATIONS["policy"]
BACKENDS = [name for name, cell in ROW.items() if cell != ROW["reference"] and probe(name).available]
ISAS: list[str] = []
if probe("cpu").available:
    from apv_fast import _C

    ISAS = _C.supported_isas()
EMBED, ACTIONS = 7, 3
Modules = tuple[list[RSSM], Actor]
Result = tuple[list[State], Tensor]


def make(
    models: int = 2, latent: int = 4, discrete: bool = False, concat: bool = False, dtype: torch.dtype = torch.float32
) -> Modules:
    """Modules whose sizes all differ and whose biases are not zero."""
    torch.manual_seed(seed_of(0))
    options: dict[str, Any] = {"discrete": latent, "dtype": dtype, "action_pad": 5}
    lower = RSSM(EMBED, 0, deter=9, hidden=11, stoch=3, **options)
    width = EMBED if models == 1 else lower.feat_dim + concat * EMBED
    upper = RSSM(width, ACTIONS, deter=13, hidden=17, stoch=5, **options)
    actor = Actor(upper.feat_dim, ACTIONS, discrete=discrete, layers=2, units=19, dtype=dtype)
    rssms = [lower, upper][-models:]
    for module in (*rssms, actor):
        change(module)
    return rssms, actor


@torch.no_grad()
def change(module: torch.nn.Module) -> None:
    for weight in module.parameters():
        weight.add_(0.3 * torch.randn_like(weight))


def policies(modules: Modules, backend: str, concat: bool = False) -> tuple[Policy, Policy]:
    """On the backend, and on modules."""
    rssms, actor = modules
    return _implementation("policy", backend)(rssms, actor, concat_embed=concat), ModulePolicy(
        rssms, actor, concat_embed=concat
    )


def begin(rssms: Sequence[RSSM], rows: int) -> Result:
    states = [{key: torch.randn_like(x) for key, x in model.initial(rows).items()} for model in rssms]
    return states, torch.rand(rows, ACTIONS)


def play(policy: Policy, name: str, start: Result, *, explore: bool = True, steps: int = 3) -> list[Result]:
    """Some steps, the second of which begins an episode of row 0."""
    rows, results = len(start[1]), [start]
    embeds = torch.randn(steps, rows, EMBED, generator=torch.Generator().manual_seed(seed_of(5)))
    generator = torch.Generator().manual_seed(seed_of(6))
    for t in range(steps):
        first = torch.arange(rows).eq(0) & (t == 1)
        with use_backend(name):
            results.append(policy(embeds[t], first, *results[-1], explore=explore, generator=generator))
    return results[1:]


def errors(got: list[Result], expected: list[Result]) -> Tensor:
    """Relative errors of every state's and action's tensor."""
    distances = []
    for (states, action), (wanted, other) in zip(got, expected, strict=True):
        pairs = [(action, other)]
        for state, want in zip(states, wanted, strict=True):
            assert state.keys() == want.keys()
            pairs += [(x, want[key]) for key, x in state.items()]
        for x, y in pairs:
            assert x.shape == y.shape and x.dtype == y.dtype
            distances.append(torch.dist(x, y) / y.norm().clamp(min=1e-9))
    return torch.stack(distances)


def assert_close(got: list[Result], expected: list[Result], tolerance: float) -> None:
    assert errors(got, expected).max() <= tolerance


OPTIONS: dict[str, dict[str, Any]] = {
    "one-hot": {},
    "concat": {"concat": True, "discrete": True},
    "single": {"models": 1},
    "single gaussian": {"models": 1, "discrete": True, "latent": 0},
    "float64": {"latent": 0, "dtype": torch.float64},
}
BFLOAT16: dict[str, Any] = {"latent": 0, "dtype": torch.bfloat16}  # one-hot samples would hang on the rounding


@pytest.mark.parametrize(("name", "isa"), [(name, "") for name in OPTIONS] + [("one-hot", isa) for isa in ISAS])
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_its_modules(backend: str, name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """States and actions, from the same random numbers."""
    if isa:
        monkeypatch.setenv("APV_FAST_CPU_ISA", isa)
    options = OPTIONS[name]
    modules, concat = make(**options), options.get("concat", False)
    policy, plain = policies(modules, backend, concat)
    start = begin(modules[0], 3)
    tolerance = 1e-12 if name == "float64" else 1e-5
    for explore in (True, False):
        got, expected = (
            play(each, on, start, explore=explore) for each, on in ((policy, backend), (plain, "reference"))
        )
        assert_close(got, expected, tolerance)
        assert not torch.allclose(got[0][0][0]["deter"], got[1][0][0]["deter"], atol=1e-3)


@pytest.mark.statistical
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16(backend: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most twice the error of PyTorch's products in bfloat16, both against float32 with the same weights."""
    monkeypatch.setenv("APV_FAST_CPU_ISA", isa)
    modules, wide = make(**BFLOAT16), make(**BFLOAT16 | {"dtype": torch.float32})
    start = begin(modules[0], 3)
    policy, plain = policies(modules, backend)
    exact = play(ModulePolicy(*wide, concat_embed=False), "reference", start)
    runs = (play(policy, backend, start), *yardsticks(lambda: play(plain, "reference", start)))
    error, *others = (errors(each, exact).square().mean().sqrt() for each in runs)
    allowed = min(others)
    assert 1e-4 < allowed < 0.1 and error <= 2 * allowed, f"{error:.2e}, PyTorch {allowed:.2e}"


@pytest.mark.statistical
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_with_one_hots(backend: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where rounding has changed no sample."""
    monkeypatch.setenv("APV_FAST_CPU_ISA", isa)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "concat": True}
    modules, wide = make(**options), make(concat=True)
    policy, plain = policies(modules, backend, concat=True)
    precise = ModulePolicy(*wide, concat_embed=True)
    squares = []
    for _ in range(20):
        start = begin(modules[0], 1)
        of = ((precise, "reference"), (policy, backend))
        exact, got = (play(each, on, start, steps=1) for each, on in of)
        expected = yardsticks(functools.partial(play, plain, "reference", start, steps=1))[0]
        samples = [torch.cat([state["stoch"].flatten() for state in result[0][0]]) for result in (exact, got, expected)]
        if torch.equal(samples[0], samples[1]) and torch.equal(samples[0], samples[2]):
            squares.append([errors(each, exact).square().mean() for each in (got, expected)])
    assert len(squares) >= 5
    error, allowed = torch.tensor(squares).mean(0).sqrt()
    assert 1e-4 < allowed < 0.1 and error <= 2 * allowed, f"{error:.2e}, PyTorch {allowed:.2e}"


@pytest.mark.parametrize(
    ("latent", "dtype"),
    [(0, torch.float32), (0, torch.bfloat16), (4, torch.float32)],
    ids=["float32", "bfloat16", "one-hot float32"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_changed_in_place_count(backend: str, latent: int, dtype: torch.dtype) -> None:
    """After a step of the optimiser, after loading a checkpoint, and after an assignment of new parameters."""
    torch.manual_seed(0)
    modules = make(latent=latent, dtype=dtype)
    policy, plain = policies(modules, backend)
    start = begin(modules[0], 2)
    weights = [w for module in (*modules[0], modules[1]) for w in module.parameters()]
    optimizer = KerasAdam(weights, 0.1, backend=backend)
    other = make(latent=latent, dtype=dtype)
    for module in (*other[0], other[1]):
        change(module)

    def learn() -> None:
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer.step()

    def load(assign: bool) -> None:
        for module, source in zip((*modules[0], modules[1]), (*other[0], other[1]), strict=True):
            module.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)

    before = play(policy, backend, start)
    for alter in (learn, lambda: load(False), learn, lambda: load(True)):
        alter()
        after = play(policy, backend, start)
        moved, apart = errors(after, before).max(), errors(after, play(plain, "reference", start)).max()
        assert moved > 0.3  # how close bfloat16 must be is tested above
        assert apart <= (moved / 5 if dtype == torch.bfloat16 else 1e-5)
        before = after


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_and_copies(backend: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits on any number of threads, from several callers at once, and from a copy."""
    monkeypatch.setenv("APV_FAST_CPU_ISA", isa)
    modules = make()
    policy, _ = policies(modules, backend)
    start, threads = begin(modules[0], 5), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(play(policy, backend, start))
    finally:
        torch.set_num_threads(threads)
    with ThreadPoolExecutor(4) as pool:
        results += pool.map(lambda _: play(policy, backend, start), range(8))
    results.append(play(copy.deepcopy(policy), backend, start))
    for result in results[1:]:
        assert_close(result, results[0], 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_copy_follows_its_own_weights(backend: str) -> None:
    modules = make()
    policy, _ = policies(modules, backend)
    start = begin(modules[0], 1)
    before = play(policy, backend, start)
    twin = copy.deepcopy(policy)
    change(modules[1])
    assert_close(play(twin, backend, start), before, 0)
    assert not torch.equal(play(policy, backend, start)[0][1], before[0][1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["embed", "is_first", "action", "states[0]['deter']", "states[1]['stoch']"])
def test_a_bad_argument_is_named(name: str, backend: str) -> None:
    """None of them is read before that: rows and columns that are missing, and another device."""
    modules = make()
    policy = policies(modules, backend)[0]
    states, action = begin(modules[0], 3)
    arguments = {"embed": torch.zeros(3, EMBED), "is_first": torch.zeros(3, dtype=torch.bool), "action": action}
    arguments |= {f"states[{i}]['{key}']": x for i, state in enumerate(states) for key, x in state.items()}

    def act(x: Tensor) -> Result:
        inputs = arguments | {name: x}
        model_states = [{key: inputs[f"states[{i}]['{key}']"] for key in state} for i, state in enumerate(states)]
        return policy(inputs["embed"], inputs["is_first"], model_states, inputs["action"], explore=True)

    good = arguments[name]
    act(good)
    spoilt = [good[None], good.to("meta"), *([] if name == "embed" else [good[:2]])]
    for bad in spoilt if good.dim() == 1 else [*spoilt, good[:, 1:]]:
        with pytest.raises(ValueError, match=re.escape(f"policy: {name} has shape")):
            act(bad)
    if name == "is_first":
        with pytest.raises(TypeError, match="is_first has dtype torch"):
            act(good.float())

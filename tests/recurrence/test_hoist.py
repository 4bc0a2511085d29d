"""The scan's host side around its plain core: hoisting and products after the recurrence change nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from apv_fast import backend as backends
from apv_fast import ops
from apv_fast.backend import Status
from apv_fast.recurrence.observe import observe_on
from apv_fast.recurrence.plain import PlainScan
from apv_fast.recurrence.stacked import TwoScans, stacked_on
from apv_fast.reference.noise import gumbel_noise, normal_noise
from tests.support.rssm_cases import CASES, SIZES, Sizes, make_case, make_problem, observe, params_of
from tests.support.rssm_errors import relative_errors, run

plain_observe = observe_on("plain", PlainScan())
plain_stacked = stacked_on("plain", TwoScans(PlainScan()))


def plain_probe() -> Status:
    return Status(True, devices=("cpu",), isa="plain", dtypes=(torch.float32, torch.float64, torch.bfloat16))


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A backend "plain" in the table, for these tests only."""
    monkeypatch.setitem(backends.PROBES, "plain", f"{__name__}:plain_probe")
    monkeypatch.setitem(backends.IMPLEMENTATIONS["rssm_observe"], "plain", f"{__name__}:plain_observe")
    monkeypatch.setitem(backends.IMPLEMENTATIONS["stacked_observe"], "plain", f"{__name__}:plain_stacked")
    yield
    backends.probe.cache_clear()


@pytest.mark.parametrize("sample", [True, False], ids=["sample", "mode"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize("case", ["observe", "stacked", "stacked_concat"])
def test_hoisting_changes_nothing(case: str, sizes: Sizes, sample: bool) -> None:
    tensors = make_case(case, sizes, torch.float64)
    got, expected = (run(case, tensors, sizes, name, sample) for name in ("plain", "reference"))
    assert max(relative_errors(got, expected).values()) < 1e-12


@pytest.mark.parametrize("case", ["observe", "stacked"])
def test_opaque_ops_are_sound(case: str) -> None:
    """Compiled without a graph break, with fake tensors and gradients."""
    sizes = SIZES["one step"]
    tensors = make_case(case, sizes, torch.float32)
    compiled = torch.compile(CASES[case][1], fullgraph=True, backend="aot_eager")
    leaves = {n: x.requires_grad_() if x.is_floating_point() else x for n, x in tensors.items()}
    weights = [x for n, x in leaves.items() if "weight" in n]
    results = []
    for call in (compiled, CASES[case][1]):
        outputs = call(leaves, sizes, "plain", True)
        results.append(torch.autograd.grad(sum(x.sum() for x in outputs.values()), weights))  # type: ignore[arg-type]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["odd", "gaussian"])
def test_some_outputs_unused(name: str) -> None:
    """Gradients of one output at a time, as losses that read only some of them ask for."""
    sizes = SIZES[name]
    tensors = make_problem(sizes, torch.float64)
    leaves = {n: x.requires_grad_() for n, x in tensors.items() if n.startswith("params.")}
    for output in observe(tensors, sizes, "reference"):
        gradients = []
        for backend in ("plain", "reference"):
            values = observe(tensors, sizes, backend)[output]
            cotangent = torch.linspace(-1, 1, values.numel(), dtype=torch.float64).view_as(values)
            grads = torch.autograd.grad((values * cotangent).sum(), list(leaves.values()), allow_unused=True)
            gradients.append(
                [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves.values(), strict=True)]
            )
        for got, expected, leaf in zip(*gradients, leaves, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12, msg=f"{leaf} from {output}")


@pytest.mark.parametrize("name", ["odd", "gaussian"])
def test_a_seed_stands_for_its_noise(name: str) -> None:
    sizes = SIZES[name]
    tensors = make_problem(sizes, torch.float32)
    seeds = torch.tensor(7), torch.tensor(-(2**40))
    shape = (sizes.batch, sizes.length, sizes.stoch)
    first, second = (
        gumbel_noise(seed, *shape, sizes.discrete) if sizes.discrete else normal_noise(seed, *shape) for seed in seeds
    )
    inputs = (params_of(tensors), tensors["embed"], tensors["is_first"], tensors["action"])
    for backend in ("reference", "plain"):
        results = [
            ops.rssm_observe(*inputs, latent=sizes.latent, noise=n, backend=backend) for n in (seeds, (first, second))
        ]
        for seeded, drawn in zip(*results, strict=True):
            for key, x in drawn.items():
                assert torch.equal(seeded[key], x), key

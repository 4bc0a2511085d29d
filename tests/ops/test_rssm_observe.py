"""``rssm_observe`` on every backend: filtering a sequence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from apv_fast import ops
from apv_fast.backend import probe
from tests.support.rssm_cases import (
    SIZES,
    Sizes,
    backends_of,
    make_problem,
    observe,
    params_of,
)
from tests.support.rssm_contract import Defined
from tests.support.rssm_errors import taken

# Backends that take float64.
EXACT = [name for name in backends_of("observe") if torch.float64 in probe(name).dtypes]


class TestObserve(Defined):
    cases = ("observe",)


@pytest.mark.parametrize("backend", EXACT)
def test_is_first_starts_again_from_zeros(backend: str) -> None:
    sizes = SIZES["odd"]
    tensors = make_problem(sizes, torch.float64, device=probe(backend).devices[-1])
    tensors["is_first"] = torch.zeros_like(tensors["is_first"])
    tensors["is_first"][1, 2] = tensors["is_first"][2, 0] = True
    whole = observe(tensors, sizes, backend)
    for row, start in ((1, 2), (2, 0)):
        part = {name: x if name.startswith("params.") else x[row : row + 1] for name, x in tensors.items()}
        for name in ("embed", "action", "is_first", "post_noise", "prior_noise"):
            part[name] = part[name][:, start:].clone()
        part["deter"], part["stoch"] = torch.zeros_like(part["deter"]), torch.zeros_like(part["stoch"])
        part["action"][:, 0] = 0
        part["is_first"][:] = False
        for name, x in observe(part, replace(sizes, batch=1), backend).items():
            torch.testing.assert_close(x[0], whole[name][row, start:], msg=name)


@pytest.mark.parametrize("backend", backends_of("observe"))
def test_no_state_is_zeros(backend: str) -> None:
    sizes = SIZES["odd"]
    tensors = make_problem(sizes, taken(backend, torch.float32), device=probe(backend).devices[-1])
    params, noise = params_of(tensors), (tensors["post_noise"], tensors["prior_noise"])
    inputs = (params, tensors["embed"], tensors["is_first"], tensors["action"])
    initial = ops.initial_state(params, sizes.latent, sizes.batch)
    assert {name: tuple(x.shape) for name, x in initial.items()} == {
        "deter": (3, 9), "stoch": (3, 3, 7), "logit": (3, 3, 7),
    }  # fmt: skip
    assert not any(x.any() for x in initial.values())
    with_state, _ = ops.rssm_observe(*inputs, initial, latent=sizes.latent, noise=noise, backend=backend)
    without, _ = ops.rssm_observe(*inputs, latent=sizes.latent, noise=noise, backend=backend)
    assert torch.equal(with_state["logit"], without["logit"])


def test_one_noise_tensor_serves_both() -> None:
    sizes = SIZES["odd"]
    tensors = make_problem(sizes, torch.float32)
    inputs = (params_of(tensors), tensors["embed"], tensors["is_first"], tensors["action"])
    one, two = tensors["post_noise"], tensors["prior_noise"]
    _, prior = ops.rssm_observe(*inputs, latent=sizes.latent, noise=one)
    _, same = ops.rssm_observe(*inputs, latent=sizes.latent, noise=(one, one))
    _, other = ops.rssm_observe(*inputs, latent=sizes.latent, noise=(one, two))
    assert torch.equal(prior["stoch"], same["stoch"])
    assert not torch.equal(prior["stoch"], other["stoch"])


@pytest.mark.parametrize("discrete", [7, 0], ids=["categorical", "gaussian"])
def test_a_generator_fixes_the_samples(discrete: int) -> None:
    sizes = replace(SIZES["odd"], discrete=discrete)
    tensors = make_problem(sizes, torch.float32)
    inputs = (params_of(tensors), tensors["embed"], tensors["is_first"], tensors["action"])

    def sample(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return ops.rssm_observe(*inputs, latent=sizes.latent, generator=generator)[0]["stoch"]

    torch.manual_seed(0)
    first = sample(1)
    assert torch.equal(first, sample(1))
    assert not torch.equal(first, sample(2))


@pytest.mark.parametrize("backend", backends_of("observe"))
def test_samples_follow_the_distribution(backend: str) -> None:
    """20 000 first steps of one state: the frequency of every class is its probability."""
    sizes = Sizes(1, 1, 2, 0, 1, 3, 4, 2, 5)
    device = probe(backend).devices[-1]
    tensors = make_problem(sizes, taken(backend, torch.float32), device=device)
    embed = tensors["embed"].expand(20_000, 1, 2)
    generator = torch.Generator(device).manual_seed(0)
    is_first = torch.ones(20_000, 1, dtype=torch.bool, device=device)
    states = ops.rssm_observe(
        params_of(tensors), embed, is_first, latent=sizes.latent, generator=generator, backend=backend
    )
    for state in states:
        probability = state["logit"][0, 0].softmax(-1)
        assert (state["stoch"].mean((0, 1)) - probability).abs().max() < 0.015  # four standard deviations

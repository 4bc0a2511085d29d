"""``rssm_imagine`` on every backend: the prior rolled out under given actions."""

from __future__ import annotations

import pytest
import torch

from apv_fast import ops
from apv_fast.backend import probe
from apv_fast.reference.noise import gumbel_noise, normal_noise
from tests.support.rssm_cases import (
    Sizes,
    backends_of,
    flat,
    imagine,
    make_problem,
    params_of,
    step,
)
from tests.support.rssm_contract import Defined, WithoutGradients
from tests.support.rssm_errors import relative_errors


class TestImagine(Defined, WithoutGradients):
    cases = ("imagine",)


@pytest.mark.parametrize("discrete", [7, 0], ids=["categorical", "gaussian"])
@pytest.mark.parametrize("backend", backends_of("imagine"))
def test_seeds_of_given_actions_and_of_one_step(backend: str, discrete: int) -> None:
    """Batch-first, so a step's noise is not one piece of the whole's."""
    sizes = Sizes(3, 3, 1, 2, 3, 9, 5, 3, discrete)
    tensors = make_problem(sizes, torch.float64, device=probe(backend).devices[-1])
    seed, width = torch.tensor(11, device=tensors["deter"].device), (discrete,) * bool(discrete)
    make_noise = gumbel_noise if discrete else normal_noise
    for call, leading in ((imagine, (sizes.batch, sizes.length)), (step, (sizes.batch, 1))):
        noise = make_noise(seed, *leading, sizes.stoch, *width).double()
        expected = call(tensors | {"post_noise": noise, "prior_noise": noise}, sizes, "reference")
        # step() takes step 0 of the noise that it is given, a seed has but one.
        state, action = {key: tensors[key] for key in ("deter", "stoch")}, tensors["action"]
        params, latent = params_of(tensors), sizes.latent
        if call is imagine:
            seeded = flat(prior=ops.rssm_imagine(params, state, action, latent=latent, noise=seed, backend=backend))
        else:
            inputs = (params, state, action[:, 0], tensors["embed"][:, 0], tensors["is_first"][:, 0])
            post, prior = ops.rssm_step(*inputs, latent=latent, noise=seed, backend=backend)
            seeded = flat(post=post, prior=prior)
        assert max(relative_errors(seeded, {key: expected[key] for key in seeded}).values()) < 1e-6

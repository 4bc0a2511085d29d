"""``rssm_step`` on every backend: one step, with an observation and without."""

from __future__ import annotations

import pytest
import torch

from apv_fast.backend import probe
from tests.support.rssm_cases import (
    SIZES,
    backends_of,
    make_problem,
    step,
)
from tests.support.rssm_contract import WithoutGradients


class TestStep(WithoutGradients):
    cases = ("step",)


@pytest.mark.parametrize("backend", backends_of("step"))
def test_samples_are_one_hot_with_the_gradient_of_softmax(backend: str) -> None:
    """With respect to obs_dist's bias, which is added to the logits; a mode has no gradient."""
    sizes = SIZES["odd"]
    tensors = make_problem(sizes, torch.float64, device=probe(backend).devices[-1])
    bias = tensors["params.obs_dist_bias"].requires_grad_()
    for sample in (True, False):
        outputs = step(tensors, sizes, backend, sample)
        stoch, logit = outputs["post.stoch"], outputs["post.logit"]
        assert set(stoch.flatten().tolist()) == {0.0, 1.0}
        assert (stoch.sum(-1) == 1).all()
        cotangent = torch.randn(stoch.shape, dtype=torch.float64).to(stoch.device)
        if not sample:
            assert not stoch.requires_grad
            assert torch.equal(stoch.argmax(-1), logit.argmax(-1))
            continue
        (got,) = torch.autograd.grad((stoch * cotangent).sum(), bias, retain_graph=True)
        (expected,) = torch.autograd.grad((logit.softmax(-1) * cotangent).sum(), bias)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", backends_of("step"))
def test_what_came_before_the_beginning_is_forgotten(backend: str) -> None:
    """NaN too, which a product with zero would keep."""
    sizes = SIZES["odd"]
    tensors = make_problem(sizes, torch.float32, device=probe(backend).devices[-1])
    tensors["is_first"] = torch.ones_like(tensors["is_first"])
    clean = step(tensors, sizes, backend, True)
    for name in ("deter", "stoch", "action"):
        tensors[name] = torch.full_like(tensors[name], torch.nan)
    spoilt = step(tensors, sizes, backend, True)
    seen = [name for name in clean if not name.startswith("blind")]
    assert seen and all(torch.equal(spoilt[name], clean[name]) for name in seen)

"""``RSSM``: its sequences are its steps, and what an action-free one makes of actions."""

from __future__ import annotations

import pytest
import torch

from apv_fast.nn import RSSM
from tests.support.rssm_cases import (
    SIZES,
    make_problem,
)


@pytest.mark.parametrize("sample", [True, False], ids=["sample", "mode"])
@pytest.mark.parametrize("name", ["odd", "gaussian", "action-free"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_sequences_equal_their_steps(name: str, dtype: torch.dtype, sample: bool) -> None:
    """``observe`` is T ``obs_step``, ``imagine`` is T ``img_step``, in one module; states are float32."""
    sizes = SIZES[name]
    tensors = make_problem(sizes, torch.float32)
    torch.manual_seed(0)
    model = RSSM(
        sizes.embed,
        sizes.action,
        deter=sizes.deter,
        hidden=sizes.hidden,
        stoch=sizes.stoch,
        discrete=sizes.discrete,
        dtype=dtype,
    )
    embed, is_first, action = tensors["embed"], tensors["is_first"], tensors.get("action")
    post_noise, prior_noise = tensors["post_noise"], tensors["prior_noise"]
    posts, priors = model.observe(embed, is_first, action, sample=sample, noise=(post_noise, prior_noise))
    imagined = model.imagine(model.initial(sizes.batch), action, sizes.length, sample=sample, noise=prior_noise)
    state, dream = model.initial(sizes.batch), model.initial(sizes.batch)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for t in range(sizes.length):
        a = None if action is None else action[:, t]
        noise = (post_noise[:, t], prior_noise[:, t])
        state, prior = model.obs_step(state, a, embed[:, t], is_first[:, t], sample=sample, noise=noise)
        dream = model.img_step(dream, a, sample=sample, noise=noise[1])
        for whole, one in ((posts, state), (priors, prior), (imagined, dream)):
            assert whole.keys() == one.keys()
            for key, x in one.items():
                assert x.dtype == torch.float32 == whole[key].dtype
                torch.testing.assert_close(whole[key][:, t], x, atol=tolerance, rtol=tolerance)


def test_an_action_free_model_ignores_actions() -> None:
    sizes = SIZES["action-free"]
    tensors = make_problem(sizes, torch.float32)
    model = RSSM(sizes.embed, deter=8, hidden=9, stoch=3, discrete=4)
    actions = torch.randn(2, 4, 3)
    embed, is_first = tensors["embed"], tensors["is_first"]
    with_actions, _ = model.observe(embed, is_first, actions, noise=tensors["post_noise"])
    without, _ = model.observe(embed, is_first, noise=tensors["post_noise"])
    assert torch.equal(with_actions["logit"], without["logit"])
    assert model.imagine(model.initial(2), actions, sample=False)["deter"].shape == (2, 4, 8)

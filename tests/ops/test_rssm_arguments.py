"""Bad arguments of the RSSM ops and modules: the error names the argument, what it was and what it must be."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from apv_fast import ops
from apv_fast.nn import RSSM, StackedRSSM
from apv_fast.ops import Latent, RSSMParams
from tests.support.rssm_cases import SIZES, Sizes, Tensors, make_case, make_problem, params_of, upper_sizes

ODD = SIZES["odd"]  # B = 3, T = 5, E = 7, A = 2, P = 3, D = 9, H = 5, S = 3, C = 7
Change = Callable[[Any], Any]
Bad = dict[str, tuple[str, Change, type[Exception], str]]  # id -> argument, what is done to it, error, message


def arguments(sizes: Sizes = ODD) -> dict[str, Any]:
    tensors = make_problem(sizes, torch.float32)
    names = ("embed", "is_first", "action")
    state = {"deter": tensors["deter"], "stoch": tensors["stoch"]}
    kwargs = {name: tensors[name] for name in names} | {"params": params_of(tensors), "state": state}
    return kwargs | {"latent": sizes.latent, "noise": (tensors["post_noise"], tensors["prior_noise"])}


def with_state(key: str, change: Change) -> Change:
    return lambda state: state | {key: change(state[key])}


OBSERVE: Bad = {
    "embed rank": ("embed", lambda x: x[0], ValueError, r"embed has shape (5, 7); it must be [B, T, E]"),
    "embed width": ("embed", lambda x: x[..., 1:], ValueError, r"embed has shape (3, 5, 6); it must be [B, T, E] with"),
    "embed length": ("embed", lambda x: x[:, :0], ValueError, "embed has no steps; T must be at least 1"),
    "embed dtype": ("embed", Tensor.long, TypeError, "embed has dtype torch.int64; it must be a floating-point tensor"),
    "embed device": ("embed", lambda x: x.to("meta"), ValueError, "embed is on meta; it must be on cpu"),
    "embed type": ("embed", Tensor.tolist, TypeError, "embed is a list; it must be a torch.Tensor"),
    "is_first shape": ("is_first", lambda x: x[:, 1:], ValueError, "is_first has shape (3, 4)"),
    "is_first dtype": ("is_first", Tensor.float, TypeError, "is_first has dtype torch.float32; it must be torch.bool"),
    "is_first device": ("is_first", lambda x: x.to("meta"), ValueError, "is_first is on meta"),
    "action shape": ("action", lambda x: x[1:], ValueError, "action has shape (2, 5, 2); it must be [B, T, A]"),
    "action width": ("action", lambda x: x.repeat(1, 1, 2), ValueError, "action has 4 numbers; the model pads actions"),
    "action dtype": ("action", Tensor.int, TypeError, "action has dtype torch.int32"),
    "action device": ("action", lambda x: x.to("meta"), ValueError, "action is on meta"),
    "state keys": ("state", lambda s: {"deter": s["deter"]}, ValueError, "state has the keys ['deter']; it must have"),
    "deter shape": ("state", with_state("deter", lambda x: x[:, 1:]), ValueError, "state['deter'] has shape (3, 8)"),
    "deter dtype": ("state", with_state("deter", Tensor.int), TypeError, "state['deter'] has dtype torch.int32"),
    "stoch shape": ("state", with_state("stoch", lambda x: x[:2]), ValueError, "state['stoch'] has shape (2, 3, 7)"),
    "stoch device": ("state", with_state("stoch", lambda x: x.to("meta")), ValueError, "state['stoch'] is on meta"),
    "latent": ("latent", lambda x: Latent(3, 6), ValueError, "params.img_dist_weight has shape (21, 5); it must be"),
    "stoch": ("latent", lambda x: Latent(0, 7), ValueError, "stoch is 0; it must be at least 1"),
    "discrete": ("latent", lambda x: Latent(3, -1), ValueError, "discrete is -1; it must be at least 0"),
    "noise count": ("noise", lambda n: (*n, n[0]), ValueError, "noise has 3 tensors; it must be one, or a pair"),
    "noise shape": ("noise", lambda n: n[0][..., 1:], ValueError, "noise of the posterior has shape (3, 5, 3, 6)"),
    "prior noise": ("noise", lambda n: (n[0], n[1][1:]), ValueError, "noise of the prior has shape (2, 5, 3, 7)"),
    "noise dtype": ("noise", lambda n: n[0].long(), TypeError, "noise of the posterior has dtype torch.int64"),
    "noise device": ("noise", lambda n: n[0].to("meta"), ValueError, "noise of the posterior is on meta"),
    "params count": ("params", lambda p: p[:-1], ValueError, "params has 13 tensors; see RSSMParams"),
}


def assert_raises(
    op: Callable[..., Any], kwargs: dict[str, Any], bad: tuple[str, Change, type[Exception], str]
) -> None:
    argument, change, error, message = bad
    op(**kwargs)  # without the change there is none
    with pytest.raises(error, match=re.escape(message)) as caught:
        op(**(kwargs | {argument: change(kwargs[argument])}))
    assert str(caught.value).startswith(op.__name__)


@pytest.mark.parametrize("case", OBSERVE)
def test_observe(case: str) -> None:
    assert_raises(ops.rssm_observe, arguments(), OBSERVE[case])


@pytest.mark.parametrize("name", RSSMParams._fields)
def test_every_weight_is_checked(name: str) -> None:
    kwargs = arguments()

    def change(to: Change) -> Change:
        return lambda params: params._replace(**{name: to(getattr(params, name))})

    wrong_rank = ("params", change(lambda w: w[None]), ValueError, f"params.{name} has shape (1, ")
    assert_raises(ops.rssm_observe, kwargs, wrong_rank)
    on_meta = ("params", change(lambda w: w.to("meta")), ValueError, "must be on")
    assert_raises(ops.rssm_observe, kwargs, on_meta)
    other = r"it must be torch.float32" if name != "img_in_weight" else "it must be torch.float64"
    assert_raises(ops.rssm_observe, kwargs, ("params", change(Tensor.double), TypeError, other))
    if name not in ("img_in_weight", "img_out_weight", "obs_out_weight"):  # these set H, D, E and P
        fewer = ("params", change(lambda w: w[:-1]), ValueError, f"params.{name} has shape")
        assert_raises(ops.rssm_observe, kwargs, fewer)


IMAGINE: Bad = {
    "horizon": ("horizon", lambda x: 4, ValueError, "action has shape (3, 5, 2); it must be [B, T, A] with B=3, T=4"),
    "no horizon": ("action", lambda x: None, ValueError, "horizon is None; without actions it must be"),
    "no state": ("state", lambda x: None, ValueError, "state is None; it must be a state to start from"),
    "noise": ("noise", lambda x: x[:, 1:], ValueError, "noise of the posterior has shape (3, 4, 3, 7)"),
}


@pytest.mark.parametrize("case", IMAGINE)
def test_imagine(case: str) -> None:
    kwargs = arguments()
    kwargs = {name: kwargs[name] for name in ("params", "state", "action", "latent")} | {"noise": kwargs["noise"][0]}
    assert_raises(ops.rssm_imagine, kwargs | {"horizon": None}, IMAGINE[case])


STEP: Bad = {
    "embed alone": ("is_first", lambda x: None, ValueError, "embed and is_first must be given together"),
    "embed": ("embed", lambda x: x[1:], ValueError, "embed has shape (2, 7); it must be [B, E] with B=3"),
    "is_first": ("is_first", lambda x: x[:, None], ValueError, "is_first has shape (3, 1); it must be [B]"),
    "action": ("action", lambda x: x[:, None], ValueError, "action has shape (3, 1, 2); it must be [B, A]"),
    "no state": ("state", lambda x: None, ValueError, "state is None; it must be a state to start from"),
    "noise": ("noise", lambda n: n[0][None], ValueError, "noise of the posterior has shape (1, 3, 3, 7)"),
}


@pytest.mark.parametrize("case", STEP)
def test_step(case: str) -> None:
    kwargs = arguments()
    kwargs |= {name: kwargs[name][:, 0] for name in ("embed", "is_first", "action")}
    kwargs["noise"] = tuple(x[:, 0] for x in kwargs["noise"])
    assert_raises(ops.rssm_step, kwargs, STEP[case])


LOWER, UPPER = "stacked_observe: action-free model: ", "stacked_observe: action-conditional model: "
STACKED: Bad = {
    "embed": ("embed", lambda x: x[..., 1:], ValueError, LOWER + "embed has shape (3, 5, 6)"),
    "is_first": ("is_first", Tensor.int, TypeError, LOWER + "is_first has dtype torch.int32; it must be torch.bool"),
    "no action": ("action", lambda x: None, ValueError, UPPER + "action is None; it must be [B, T, A]"),
    "action": ("action", lambda x: x[:, 1:], ValueError, UPPER + "action has shape (3, 4, 2)"),
    "action device": ("action", lambda x: x.to("meta"), ValueError, UPPER + "action is on meta"),
    "concat": ("concat_embed", lambda x: True, ValueError, UPPER + "params.obs_out_weight takes an embedding of 30"),
    "noise": ("noise", lambda x: x[1:], ValueError, UPPER + "noise of the posterior has shape (2, 5, 4, 7)"),
    "af_noise": ("af_noise", lambda x: x[1:], ValueError, LOWER + "noise of the posterior has shape (2, 5, 3, 7)"),
    "latent": ("latent", lambda x: Latent(4, 6), ValueError, UPPER + "params.img_dist_weight has shape (28, 7)"),
    "models on two devices": (
        "params",
        lambda p: RSSMParams(*(w.to("meta") for w in p)),
        ValueError,
        UPPER + "params.img_in_weight is on meta; it must be on cpu",
    ),
}


@pytest.mark.parametrize("case", STACKED)
def test_stacked(case: str) -> None:
    tensors = make_case("stacked", ODD, torch.float32)
    lower: Tensors = {name.removeprefix("af."): x for name, x in tensors.items() if name.startswith("af.")}
    kwargs = {"af_params": params_of(lower), "params": params_of(tensors), "concat_embed": False}
    kwargs |= {name: tensors[name] for name in ("embed", "is_first", "action")}
    kwargs |= {"af_latent": ODD.latent, "latent": upper_sizes(ODD, False).latent}
    kwargs |= {"af_noise": lower["post_noise"], "noise": tensors["post_noise"]}
    assert_raises(ops.stacked_observe, kwargs, STACKED[case])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"embed_dim": 0}, "embed_dim is 0; it must be at least 1"),
        ({"deter": 0}, "deter is 0"),
        ({"hidden": -1}, "hidden is -1"),
        ({"stoch": 0}, "stoch is 0"),
        ({"discrete": -1}, "discrete is -1; it must be at least 0"),
        ({"action_dim": 51}, "action_dim is 51; it must be between 0 and action_pad = 50"),
        ({"action_dim": -1}, "action_dim is -1"),
        ({"act": "relu"}, "act is 'relu'; it must be 'elu'"),
        ({"std_act": "softplus"}, "std_act is 'softplus'; it must be 'sigmoid2'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_rssm_constructor(changed: dict[str, Any], message: str) -> None:
    sizes: dict[str, Any] = {"embed_dim": 3, "action_dim": 2, "deter": 4, "hidden": 5, "stoch": 2, "discrete": 3}
    RSSM(**sizes)
    with pytest.raises(ValueError, match=re.escape(message)):
        RSSM(**(sizes | changed))


def model(embed: int, action: int) -> RSSM:
    return RSSM(embed, action, deter=4, hidden=5, stoch=2, discrete=3)


def test_rssm_needs_the_actions_that_it_was_made_for() -> None:
    rssm, embed, is_first = model(3, 2), torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="action is None; this model was made with action_dim = 2"):
        rssm.observe(embed, is_first)
    with pytest.raises(ValueError, match="its last size must be 2"):
        rssm.observe(embed, is_first, torch.zeros(1, 2, 1))


def test_stacked_rssm() -> None:
    lower = model(3, 0)
    stack = StackedRSSM(lower, model(10, 2))  # 2·3 + 4
    assert StackedRSSM(lower, model(13, 2), concat_embed=True).concat_embed
    with pytest.raises(ValueError, match=r"embed_dim 10; it must be 13, the width .* and the embedding"):
        StackedRSSM(lower, model(10, 2), concat_embed=True)
    with pytest.raises(ValueError, match="action_free has action_dim 1; it must be 0"):
        StackedRSSM(model(3, 1), model(10, 2))
    with pytest.raises(ValueError, match="action_conditional has action_dim 0"):
        StackedRSSM(lower, model(10, 0))
    with pytest.raises(ValueError, match="its last size must be 2"):
        stack.observe(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.bool), torch.zeros(1, 2, 3))


def test_gaussian_shapes() -> None:
    gaussian = replace(ODD, discrete=0)
    message = "state['stoch'] has shape (3, 2); it must be [B, S] with B=3, S=3"
    bad = ("state", with_state("stoch", lambda x: x[:, 1:]), ValueError, message)
    assert_raises(ops.rssm_observe, arguments(gaussian), bad)

"""Golden comparisons of single ops and modules; see tests/parity.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apv_fast import ops
from apv_fast.agent.world_model import image_loss
from apv_fast.nn import RSSM, Actor, Decoder, Encoder, StreamNorm
from apv_fast.nn.cnn import normalize
from apv_fast.optim import KerasAdam
from apv_fast.reference.distributions import TruncatedNormal, normal_log_prob
from apv_fast.types import State
from tests.support.official_weights import gradients, load, under

Golden = dict[str, np.ndarray]
Comparison = tuple[str, str, Any, Any]


def tensor(array: np.ndarray, *, grad: bool = False) -> Tensor:
    """A tensor of the array's values; ``grad`` makes it a leaf that wants a gradient."""
    return torch.from_numpy(np.array(array)).requires_grad_(grad)


def kl(golden: Golden, meta: dict[str, Any]) -> Iterator[Comparison]:
    """Every ``kl<i>``: loss, value and gradients of categorical or Gaussian latents."""
    for i in range(sum(name.endswith(".config") for name in golden)):
        case = under(golden, f"kl{i}.")
        forward, balance, free, free_avg = case["config"].tolist()
        discrete = "post_logit" in case
        names = ["post_logit", "prior_logit"] if discrete else ["post_mean", "post_std", "prior_mean", "prior_std"]
        leaves = [tensor(case[name], grad=True) for name in names]
        op = ops.kl_balance if discrete else ops.kl_balance_normal
        settings = {"forward": bool(forward), "balance": round(balance, 6), "free": free, "free_avg": bool(free_avg)}
        loss, value = op(*leaves, **settings)
        loss.backward()
        yield "value", f"kl{i}.loss", loss, case["loss"]
        yield "value", f"kl{i}.value", value, case["value"]
        for name, leaf in zip(names, leaves, strict=True):
            key = f"grad_{name}" if f"grad_{name}" in case else f"grad_{name.removesuffix('_logit')}"
            yield "gradient", f"kl{i}.{key}", leaf.grad, case[key]


def rssm(golden: Golden, meta: dict[str, Any]) -> Iterator[Comparison]:
    """Observe by modes and with samples, gradients, imagination, and the KL losses in the same file."""
    # The action-free model ignores its action, so nothing flows back into it.
    action_dim = meta["action"] if np.any(golden["mode.grad.action"]) else 0
    model = RSSM(
        meta["embed"],
        action_dim,
        deter=meta["deter"],
        hidden=meta["hidden"],
        stoch=meta["stoch"],
        discrete=meta["discrete"],
        action_pad=meta["action_pad"],
    )
    load(model, under(golden, "w."))
    for mode in ("mode", "sample"):
        if f"{mode}.loss" in golden:
            yield from _observe(model, golden, mode)
    yield from _imagine(model, golden)
    yield from kl(golden, meta)


def _observe(model: RSSM, golden: Golden, mode: str) -> Iterator[Comparison]:
    case = under(golden, f"{mode}.")
    model.zero_grad()
    embed, action = tensor(golden["embed"], grad=True), tensor(golden["action"], grad=True)
    state = {name: tensor(array) for name, array in under(golden, "init.").items()}
    state["deter"].requires_grad_()
    noise = (tensor(case["post_gumbel"]), tensor(case["prior_gumbel"])) if mode == "sample" else None
    is_first = tensor(golden["is_first"])
    post, prior = model.observe(embed, is_first, action, state, sample=noise is not None, noise=noise)
    yield "value", f"{mode}.feat", model.feat(post), case["feat"]
    loss = torch.zeros(())
    for side, states in (("post", post), ("prior", prior)):
        for name, value in states.items():
            yield "value", f"{mode}.{side}.{name}", value, case[f"{side}.{name}"]
            loss = loss + (value * tensor(case[f"cotangent.{side}.{name}"])).sum()
    loss.backward()
    yield "value", f"{mode}.loss", loss, case["loss"]
    for name, leaf in (("embed", embed), ("action", action), ("init_deter", state["deter"])):
        grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        yield "gradient", f"{mode}.grad.{name}", grad, case[f"grad.{name}"]
    for name, ours, official in gradients(model, under(case, "grad.w.")):
        yield "gradient", f"{mode}.grad.w.{name}", ours, official


def _imagine(model: RSSM, golden: Golden) -> Iterator[Comparison]:
    case = under(golden, "imagine.")
    state: State = {name: tensor(array) for name, array in under(golden, "init.").items()}
    noise = tensor(case["gumbel"]) if "gumbel" in case else None
    prior = model.imagine(state, tensor(golden["action"]), sample=noise is not None, noise=noise)
    for name, value in prior.items():
        yield "value", f"imagine.{name}", value, case[name]


def cnn(golden: Golden, meta: dict[str, Any]) -> Iterator[Comparison]:
    """Encoder and decoder, each with its gradients."""
    encoder = Encoder(meta["cnn_depth"], channels=golden["image"].shape[-1])
    load(encoder, under(golden, "enc."))
    image = tensor(golden["image"])
    embed = encoder(image)
    yield "value", "embed", embed, golden["embed"]
    (embed * tensor(golden["embed_cotangent"])).sum().backward()
    for name, ours, official in gradients(encoder, under(golden, "grad.enc.")):
        yield "gradient", f"grad.enc.{name}", ours, official
    feat = tensor(golden["feat"], grad=True)
    decoder = Decoder(feat.shape[-1], meta["cnn_depth"], channels=image.shape[-1])
    load(decoder, under(golden, "dec."))
    recon = decoder(feat)
    yield "value", "recon", recon, golden["recon"]
    log_prob = normal_log_prob(normalize(image), recon).sum((-3, -2, -1))
    yield "value", "log_prob", log_prob, golden["log_prob"]
    nll = image_loss(decoder, feat, image)
    nll.backward()
    yield "value", "nll", nll, golden["nll"]
    yield "gradient", "grad.feat", feat.grad, golden["grad.feat"]
    for name, ours, official in gradients(decoder, under(golden, "grad.dec.")):
        yield "gradient", f"grad.dec.{name}", ours, official


def stream_norm(golden: Golden, meta: dict[str, Any]) -> Iterator[Comparison]:
    """Successive inputs, outputs and magnitudes."""
    norm = StreamNorm(meta["momentum"], meta["scale"], meta["eps"])
    for i in range(sum(name.startswith("in") for name in golden)):
        yield "value", f"out{i}", norm(tensor(golden[f"in{i}"])), golden[f"out{i}"]
        yield "value", f"mag{i}", norm.mag, golden[f"mag{i}"]


def lambda_return(golden: Golden, meta: dict[str, Any]) -> Iterator[Comparison]:
    """Returns and all four gradients."""
    names = ("reward", "value", "discount", "bootstrap")
    leaves = [tensor(golden[name], grad=True) for name in names]
    returns = ops.lambda_return(*leaves, lambda_=meta["lambda_"])
    returns.backward(tensor(golden["cotangent"]))
    yield "value", "returns", returns, golden["returns"]
    for name, leaf in zip(names, leaves, strict=True):
        yield "gradient", f"grad_{name}", leaf.grad, golden[f"grad_{name}"]


def actor_trunc_normal(golden: Golden, meta: dict[str, Any]) -> Iterator[Comparison]:
    """Parameters, mode, log-probability and entropy, and the gradients of Σ (log_prob + 2·entropy)."""
    feat, action = tensor(golden["feat"]), tensor(golden["action"])
    units = golden["w.dense0.kernel"].shape[1]
    actor = Actor(feat.shape[-1], action.shape[-1], units=units, min_std=meta["min_std"])
    load(actor, under(golden, "w."))
    dist = actor(feat)
    assert isinstance(dist, TruncatedNormal)
    log_prob, entropy = dist.log_prob(action), dist.entropy()
    values = {"loc": dist.loc, "scale": dist.scale, "mode": dist.mode, "log_prob": log_prob, "entropy": entropy}
    for name, value in values.items():
        yield "value", name, value, golden[name]
    (log_prob + 2 * entropy).sum().backward()
    for name, ours, official in gradients(actor, under(golden, "grad.w.")):
        yield "gradient", f"grad.w.{name}", ours, official


def optimizer(golden: Golden, meta: dict[str, Any]) -> Iterator[Comparison]:
    """Weights after each step, the norm before the clip, and the change of the weights since the start."""
    a, b, target = tensor(golden["a0"], grad=True), tensor(golden["b0"], grad=True), tensor(golden["target"])
    adam = KerasAdam([a, b], meta["lr"], eps=meta["eps"], clip=meta["clip"], weight_decay=meta["wd"])
    strong = "scale" in golden  # then every step's loss has a factor of its own; else `a` has the factor 60
    for i in range(sum(name.startswith("norm") for name in golden)):
        adam.zero_grad()
        factor, stretch = (golden["scale"][i], 1) if strong else (1.0, 60)
        loss = factor * ((stretch * a - target).square().sum() + torch.sin(3 * b).sum())
        loss.backward()
        yield "value", f"norm{i}", adam.step(), golden[f"norm{i}"]
        for name, weight in (("a", a), ("b", b)):
            yield "value", f"{name}{i + 1}", weight, golden[f"{name}{i + 1}"]
            if strong:  # weak steps are too small to be seen through the weights' rounding
                change = golden[f"{name}{i + 1}"].astype(np.float64) - golden[f"{name}0"]
                yield (
                    "gradient",
                    f"{name}{i + 1} - {name}0",
                    weight.detach().double() - tensor(golden[f"{name}0"]).double(),
                    change,
                )

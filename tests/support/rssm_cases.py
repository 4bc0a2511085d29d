"""Problems for the RSSM ops: inputs of any size, the ops under one signature, and their definition written in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apv_fast import ops
from apv_fast.backend import IMPLEMENTATIONS, probe
from apv_fast.ops import Latent, RSSMParams, State
from tests.support.yardstick import seed_of


@dataclass(frozen=True)
class Sizes:
    """B, T, E, A (0: action-free), P, D, H, S, C (0: Gaussian)."""

    batch: int
    length: int
    embed: int
    action: int
    pad: int
    deter: int
    hidden: int
    stoch: int
    discrete: int

    @property
    def latent(self) -> Latent:
        return Latent(self.stoch, self.discrete)

    @property
    def feat(self) -> int:
        return self.stoch * (self.discrete or 1) + self.deter


class EqualSizes(Sizes):
    """Those of both models of a stack, as in production."""


SIZES = {
    "ones": Sizes(1, 1, 1, 1, 1, 1, 1, 1, 2),
    "odd": Sizes(3, 5, 7, 2, 3, 9, 5, 3, 7),
    "one row": Sizes(1, 4, 5, 3, 3, 7, 11, 5, 3),
    "one step": Sizes(4, 1, 3, 1, 6, 5, 3, 2, 5),
    "one class": Sizes(2, 3, 3, 2, 4, 5, 7, 3, 1),
    "action-free": Sizes(2, 4, 6, 0, 5, 8, 9, 3, 4),
    "gaussian": Sizes(3, 4, 5, 2, 5, 7, 6, 3, 0),
    "wide": Sizes(2, 6, 65, 4, 50, 67, 33, 8, 17),
}

Tensors = dict[str, Tensor]


def full(batch: int, length: int) -> Sizes:
    """The paper's sizes; the encoder of depth 48, four actions."""
    return Sizes(batch, length, 1536, 4, 50, 1024, 1024, 32, 32)


def make_params(sizes: Sizes, generator: torch.Generator) -> RSSMParams:
    """Random weights of about Glorot's size, biases and scales included."""
    stoch, out = sizes.stoch * (sizes.discrete or 1), sizes.stoch * (sizes.discrete or 2)
    s = sizes
    shapes = (
        *((s.hidden, stoch + s.pad), (s.hidden,)),  # img_in
        *((3 * s.deter, s.hidden + s.deter), (3 * s.deter,), (3 * s.deter,), (3 * s.deter,)),  # gru and its norm
        *((s.hidden, s.deter), (s.hidden,), (out, s.hidden), (out,)),  # img_out, img_dist
        *((s.hidden, s.deter + s.embed), (s.hidden,), (out, s.hidden), (out,)),  # obs_out, obs_dist
    )
    weights = []
    for name, shape in zip(RSSMParams._fields, shapes, strict=True):
        values = torch.randn(shape, generator=generator, dtype=torch.float64) / sum(shape[1:], 1) ** 0.5
        weights.append(1 + 0.3 * values if name == "gru_norm_weight" else values)
    return RSSMParams(*weights)


def forced_noise(sizes: Sizes, generator: torch.Generator) -> Tensor:
    """Noise ``[B, T, S, C]`` that decides every sample whatever the rounding; Gaussian: normal ``[B, T, S]``."""
    leading = (sizes.batch, sizes.length, sizes.stoch)
    if not sizes.discrete:
        return torch.randn(leading, generator=generator, dtype=torch.float64)
    classes = torch.randint(sizes.discrete, leading, generator=generator)
    return 100.0 * torch.nn.functional.one_hot(classes, sizes.discrete).double()


def make_problem(sizes: Sizes, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> Tensors:
    """Every tensor of one model's call by name, weights under "params.NAME"."""
    generator = torch.Generator().manual_seed(seed_of(seed))
    b, t = sizes.batch, sizes.length

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {f"params.{name}": w for name, w in make_params(sizes, generator)._asdict().items()}
    latent_shape = (sizes.stoch, sizes.discrete) if sizes.discrete else (sizes.stoch,)
    tensors |= {"embed": randn(b, t, sizes.embed), "deter": randn(b, sizes.deter).tanh()}
    tensors["stoch"] = randn(b, *latent_shape)
    if sizes.action:
        tensors["action"] = randn(b, t, sizes.action).tanh()
    tensors["post_noise"], tensors["prior_noise"] = forced_noise(sizes, generator), forced_noise(sizes, generator)
    tensors = {name: x.to(device, dtype) for name, x in tensors.items()}
    tensors["is_first"] = (torch.rand(b, t, generator=generator) < 0.3).to(device)
    return tensors


def params_of(tensors: Tensors) -> RSSMParams:
    return RSSMParams(*(tensors[f"params.{name}"] for name in RSSMParams._fields))


def flat(**states: State) -> Tensors:
    return {f"{prefix}.{key}": x for prefix, state in states.items() for key, x in state.items()}


def _shared(tensors: Tensors, sizes: Sizes, backend: str | None, sample: bool) -> dict[str, Any]:
    return {"latent": sizes.latent, "sample": sample, "backend": backend}


def observe(tensors: Tensors, sizes: Sizes, backend: str | None = None, sample: bool = True) -> Tensors:
    state = {"deter": tensors["deter"], "stoch": tensors["stoch"]}
    noise = (tensors["post_noise"], tensors["prior_noise"])
    post, prior = ops.rssm_observe(
        params_of(tensors),
        tensors["embed"],
        tensors["is_first"],
        tensors.get("action"),
        state,
        noise=noise,
        **_shared(tensors, sizes, backend, sample),
    )
    return flat(post=post, prior=prior)


def imagine(tensors: Tensors, sizes: Sizes, backend: str | None = None, sample: bool = True) -> Tensors:
    state = {"deter": tensors["deter"], "stoch": tensors["stoch"]}
    prior = ops.rssm_imagine(
        params_of(tensors),
        state,
        tensors.get("action"),
        sizes.length,
        noise=tensors["prior_noise"],
        **_shared(tensors, sizes, backend, sample),
    )
    return flat(prior=prior)


def step(tensors: Tensors, sizes: Sizes, backend: str | None = None, sample: bool = True) -> Tensors:
    """Step 0 with its observation, and the same without."""
    state = {"deter": tensors["deter"], "stoch": tensors["stoch"]}
    action = tensors["action"][:, 0] if "action" in tensors else None
    shared = _shared(tensors, sizes, backend, sample)
    noise = (tensors["post_noise"][:, 0], tensors["prior_noise"][:, 0])
    params = params_of(tensors)
    post, prior = ops.rssm_step(
        params, state, action, tensors["embed"][:, 0], tensors["is_first"][:, 0], noise=noise, **shared
    )
    _, blind = ops.rssm_step(params, state, action, noise=noise, **shared)
    return flat(post=post, prior=prior, blind=blind)


def upper_sizes(sizes: Sizes, concat_embed: bool) -> Sizes:
    """Of an action-conditional model on top of one of ``sizes``: all sizes differ, so that none can be confused."""
    sizes = replace(sizes, embed=sizes.feat + concat_embed * sizes.embed, action=sizes.action or 2)
    if isinstance(sizes, EqualSizes):
        return sizes
    return replace(
        sizes,
        pad=sizes.pad + 2,
        deter=sizes.deter + 1,
        hidden=sizes.hidden + 2,
        stoch=sizes.stoch + 1,
    )


def make_stack(sizes: Sizes, dtype: torch.dtype, concat_embed: bool, seed: int = 0, device: str = "cpu") -> Tensors:
    """A problem for both models; the action-free one's tensors are under "af."."""
    lower = make_problem(replace(sizes, action=0), dtype, seed, device)
    upper = make_problem(upper_sizes(sizes, concat_embed), dtype, seed + 1, device)
    shared = {name: lower.pop(name) for name in ("embed", "is_first")}
    return {f"af.{name}": x for name, x in lower.items()} | upper | shared


def _stacked(
    concat_embed: bool, tensors: Tensors, sizes: Sizes, backend: str | None = None, sample: bool = True
) -> Tensors:
    lower = {name.removeprefix("af."): x for name, x in tensors.items() if name.startswith("af.")}
    states = ops.stacked_observe(
        params_of(lower),
        params_of(tensors),
        tensors["embed"],
        tensors["is_first"],
        tensors["action"],
        {"deter": lower["deter"], "stoch": lower["stoch"]},
        {"deter": tensors["deter"], "stoch": tensors["stoch"]},
        af_latent=sizes.latent,
        latent=upper_sizes(sizes, concat_embed).latent,
        concat_embed=concat_embed,
        sample=sample,
        af_noise=(lower["post_noise"], lower["prior_noise"]),
        noise=(tensors["post_noise"], tensors["prior_noise"]),
        backend=backend,
    )
    return flat(**states)


def stacked(tensors: Tensors, sizes: Sizes, backend: str | None = None, sample: bool = True) -> Tensors:
    return _stacked(False, tensors, sizes, backend, sample)


def stacked_concat(tensors: Tensors, sizes: Sizes, backend: str | None = None, sample: bool = True) -> Tensors:
    return _stacked(True, tensors, sizes, backend, sample)


Call = Callable[[Tensors, Sizes, str | None, bool], Tensors]
CASES: dict[str, tuple[str, Call]] = {  # name -> (op in the table, how it is called)
    "observe": ("rssm_observe", observe),
    "imagine": ("rssm_imagine", imagine),
    "step": ("rssm_step", step),
    "stacked": ("stacked_observe", stacked),
    "stacked_concat": ("stacked_observe", stacked_concat),
}


def make_case(case: str, sizes: Sizes, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> Tensors:
    """The tensors that a case takes."""
    if case.startswith("stacked"):
        return make_stack(sizes, dtype, case == "stacked_concat", seed, device)
    return make_problem(sizes, dtype, seed, device)


def backends_of(case: str) -> list[str]:
    """The backends that implement a case's op and can run here."""
    return [name for name in IMPLEMENTATIONS[CASES[case][0]] if probe(name).available]


# The definition, from the paper and Keras' documentation, in NumPy and float64.


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _elu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


def _latent(out: np.ndarray, noise: np.ndarray | None, sizes: Sizes) -> dict[str, np.ndarray]:
    if sizes.discrete:
        logit = out.reshape(len(out), sizes.stoch, sizes.discrete)
        chosen = (logit if noise is None else logit + noise).argmax(-1)
        return {"stoch": np.eye(sizes.discrete)[chosen], "logit": logit}
    mean, std = out[:, : sizes.stoch], 2 * _sigmoid(out[:, sizes.stoch :] / 2) + 0.1
    return {"stoch": mean if noise is None else mean + std * noise, "mean": mean, "std": std}


def numpy_step(
    tensors: Tensors, sizes: Sizes, state: dict[str, np.ndarray], t: int, *, look: bool, sample: bool = True
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(posterior, prior) of step t; without ``look`` the prior twice."""
    w = {name: x.double().cpu().numpy() for name, x in tensors.items()}
    p = {name.removeprefix("params."): x for name, x in w.items() if name.startswith("params.")}
    h, z = state["deter"], state["stoch"].reshape(len(state["deter"]), -1)
    a = np.zeros((len(h), sizes.pad))
    if "action" in w:
        a[:, : sizes.action] = w["action"][:, t]
    if look:
        first = w["is_first"][:, t].astype(bool)
        h, z, a = (np.where(first[:, None], 0, x) for x in (h, z, a))
    x = _elu(np.hstack([z, a]) @ p["img_in_weight"].T + p["img_in_bias"])
    g = np.hstack([x, h]) @ p["gru_weight"].T + p["gru_bias"]
    g = (g - g.mean(-1, keepdims=True)) / np.sqrt(g.var(-1, keepdims=True) + 1e-3)
    reset, candidate, update = np.split(g * p["gru_norm_weight"] + p["gru_norm_bias"], 3, axis=-1)
    update = _sigmoid(update - 1)
    h = update * np.tanh(_sigmoid(reset) * candidate) + (1 - update) * h
    x = _elu(h @ p["img_out_weight"].T + p["img_out_bias"]) @ p["img_dist_weight"].T + p["img_dist_bias"]
    prior = {"deter": h, **_latent(x, w["prior_noise"][:, t] if sample else None, sizes)}
    if not look:
        return prior, prior
    x = _elu(np.hstack([h, w["embed"][:, t]]) @ p["obs_out_weight"].T + p["obs_out_bias"])
    x = x @ p["obs_dist_weight"].T + p["obs_dist_bias"]
    return {"deter": h, **_latent(x, w["post_noise"][:, t] if sample else None, sizes)}, prior


def numpy_scan(tensors: Tensors, sizes: Sizes, *, look: bool, sample: bool) -> Tensors:
    """``observe``, or ``imagine`` without ``look``."""
    state = {name: tensors[name].double().cpu().numpy() for name in ("deter", "stoch")}
    steps = []
    for t in range(sizes.length):
        post, prior = numpy_step(tensors, sizes, state, t, look=look, sample=sample)
        state = {"deter": post["deter"], "stoch": post["stoch"]}
        steps.append({f"post.{k}": x for k, x in post.items()} | {f"prior.{k}": x for k, x in prior.items()})
    return {
        name: torch.from_numpy(np.stack([one[name] for one in steps], 1))
        for name in steps[0]
        if look or name.startswith("prior")
    }

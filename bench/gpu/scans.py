"""Contests of the RSSM's ops at full size: filtering, two models stacked, imagining."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from apv_fast import ops
from apv_fast.nn import RSSM
from apv_fast.structure import RSSMParams, State
from bench.gpu import hoisted, scanned
from bench.gpu.contests import (
    COMPILED_GRAPH,
    DEVICE,
    PHASES,
    REFERENCE_GRAPH,
    SCAN_GRAPH,
    Contest,
    Passes,
    Players,
    Prepare,
    backends_of,
    contest,
    differentiable,
    setting,
)
from bench.gpu.targets import TWO_SCANS
from bench.registry import REFERENCE

FULL = {"deter": 1024, "hidden": 1024, "stoch": 32, "discrete": 32}
EMBED, ACTIONS = 1536, 4
LSTM = "cuDNN LSTM float16"  # hidden 1024: a yardstick, less work than a posterior step


class Model:
    """An RSSM's weights as leaves in the contest's dtype, and what its scan is given."""

    def __init__(self, contest: Contest, embed: int, action: int) -> None:
        shape = contest.shape
        self.batch, self.length = shape["B"], shape["T"]
        sizes = {name: shape[name] for name in FULL}
        rssm = RSSM(embed, action, **sizes).to(DEVICE)  # type: ignore[arg-type]
        self.latent = rssm.latent
        self.params = RSSMParams(*(w.detach().to(contest.torch_dtype).requires_grad_() for w in rssm.params()))
        self.noise = tuple(self._gumbel() for _ in range(2))
        # Our kernels make their noise from a seed, as in training; rivals get theirs ready.
        self.seeds = tuple(torch.tensor(seed, device=DEVICE) for seed in (1, 2))

    def _gumbel(self) -> Tensor:
        return ops.sample_noise(self.latent, self.batch, self.length, dtype=torch.float32, device=DEVICE)

    def noise_for(self, name: str) -> tuple[Tensor, Tensor]:
        """Noise, or seeds for our backends."""
        first, second = self.noise if name == REFERENCE else self.seeds
        return first, second


class Sequences:
    """A batch: ``embed`` as the encoder gives it, ``is_first`` with one start inside, ``action``."""

    def __init__(self, contest: Contest) -> None:
        b, t = contest.shape["B"], contest.shape["T"]
        self.embed = torch.randn(b, t, contest.shape["E"], device=DEVICE).requires_grad_()
        self.is_first = torch.zeros(b, t, dtype=torch.bool, device=DEVICE)
        self.is_first[:, 0] = self.is_first[0, t // 2] = True
        self.action = torch.rand(b, t, ACTIONS, device=DEVICE) * 2 - 1


def read_by_losses(post: State, prior: State) -> list[Tensor]:
    """The outputs that get a gradient in training."""
    return [post["deter"], post["stoch"], post["logit"], prior["logit"]]


def _scan_players(op: str, forward: Callable[[str], Sequence[Tensor]], leaves: Sequence[Tensor]) -> dict[str, Prepare]:
    """The reference, eager and recorded, our backends, and Triton's phases as launches."""

    def prepare(backend: str, graph: bool, **variables: str) -> Passes:
        with setting(**variables):
            return differentiable(functools.partial(forward, backend), leaves, graph=graph)

    players: dict[str, Prepare] = {name: functools.partial(prepare, name, True) for name in backends_of(op)}
    if "triton" in players:
        players[PHASES] = functools.partial(prepare, "triton", True, APV_FAST_SCAN="phases")
    players[REFERENCE] = functools.partial(prepare, REFERENCE, False)
    players[REFERENCE_GRAPH] = functools.partial(prepare, REFERENCE, True)
    return players


def _lstm(batch: int, length: int, width: int) -> Passes:
    lstm = torch.nn.LSTM(width, width, batch_first=True).to(DEVICE, torch.float16)
    x = torch.randn(batch, length, width, device=DEVICE, dtype=torch.float16).requires_grad_()
    return differentiable(lambda: [lstm(x)[0]], [x, *lstm.parameters()], graph=False)


def _paper(action: int) -> list[dict[str, int]]:
    return [{"B": batch, "T": 50, "E": EMBED, "A": action, **FULL} for batch in (16, 50)]


@contest("rssm_observe", _paper(0), ("bfloat16", "tf32", "float32"), seconds=150)
def rssm_observe(contest: Contest) -> Players:
    """Action-free filtering; gradients of the embedding and of every weight."""
    data, model = Sequences(contest), Model(contest, contest.shape["E"], 0)
    leaves = [data.embed, *model.params]

    def forward(backend: str) -> list[Tensor]:
        noise = model.noise_for(backend)
        return read_by_losses(
            *ops.rssm_observe(
                model.params, data.embed, data.is_first, latent=model.latent, noise=noise, backend=backend
            )
        )

    def compiled() -> Passes:
        step = torch.compile(hoisted.step, dynamic=False, fullgraph=True)

        def scan() -> list[Tensor]:
            deter, stoch, logit, _, prior = hoisted.observe(
                step, model.params, data.embed, data.is_first, None, model.latent, *model.noise
            )
            return [deter, stoch, logit, prior]

        return differentiable(scan, leaves, graph=True)

    def scanning() -> Passes:
        scanned.check()
        whole = scanned.compiled(scanned.observe)

        def scan() -> list[Tensor]:
            start = hoisted.zeros(model.params, model.latent, model.batch)
            inputs = (model.params, data.embed, data.is_first, None, model.latent, *model.noise, start)
            deter, stoch, logit, _, prior = cast("list[Tensor]", whole(*inputs))
            return [deter, stoch, logit, prior]

        return differentiable(scan, leaves, graph=True)

    players = _scan_players(contest.op, forward, leaves)
    if contest.dtype != "bfloat16":
        return players
    lstm = functools.partial(_lstm, contest.shape["B"], contest.shape["T"], contest.shape["deter"])
    return {**players, SCAN_GRAPH: scanning, COMPILED_GRAPH: compiled, LSTM: lstm}  # the strongest rival first


@contest("stacked_observe", _paper(ACTIONS), ("bfloat16",), seconds=90)
def stacked_observe(contest: Contest) -> Players:
    """Both models, and for each of our backends the same as two scans one after the other."""
    data, lower = Sequences(contest), Model(contest, contest.shape["E"], 0)
    width = lower.latent.stoch * lower.latent.discrete + contest.shape["deter"]
    upper = Model(contest, width, ACTIONS)
    leaves = [data.embed, *lower.params, *upper.params]

    def forward(backend: str) -> list[Tensor]:
        states = ops.stacked_observe(
            lower.params, upper.params, data.embed, data.is_first, data.action, af_latent=lower.latent,
            latent=upper.latent, af_noise=lower.noise_for(backend), noise=upper.noise_for(backend), backend=backend,
        )  # fmt: skip
        below = read_by_losses(states["af_post"], states["af_prior"])
        return below + read_by_losses(states["post"], states["prior"])

    def two_scans(backend: str) -> list[Tensor]:
        def scan(model: Model, embed: Tensor, action: Tensor | None) -> tuple[State, State]:
            noise = model.noise_for(backend)
            return ops.rssm_observe(
                model.params, embed, data.is_first, action, latent=model.latent, noise=noise, backend=backend
            )

        below = scan(lower, data.embed, None)
        feat = torch.cat([below[0]["stoch"].flatten(2), below[0]["deter"]], -1)
        return read_by_losses(*below) + read_by_losses(*scan(upper, feat, data.action))

    def prepare(backend: str) -> Passes:
        return differentiable(functools.partial(two_scans, backend), leaves, graph=True)

    players = _scan_players(contest.op, forward, leaves)
    both = {TWO_SCANS + name: functools.partial(prepare, name) for name in backends_of(contest.op, "rssm_observe")}
    return {**players, **both}


@contest("rssm_imagine", [{"B": 2500, "T": 15, "A": ACTIONS, **FULL}], ("bfloat16",), seconds=60)
def rssm_imagine(contest: Contest) -> Players:
    """Along given actions; gradients of the actions only, as behaviour learning wants them."""
    model = Model(contest, 1, ACTIONS)
    params = RSSMParams(*(w.detach() for w in model.params))
    start = ops.initial_state(params, model.latent, contest.shape["B"])
    action = torch.rand(contest.shape["B"], contest.shape["T"], ACTIONS, device=DEVICE).requires_grad_()

    def forward(backend: str) -> list[Tensor]:
        noise = model.noise_for(backend)[0]
        prior = ops.rssm_imagine(params, start, action, latent=model.latent, noise=noise, backend=backend)
        return [prior["deter"], prior["stoch"]]

    players = _scan_players(contest.op, forward, [action])
    return {name: player for name, player in players.items() if name != PHASES}

"""The scans of the RSSM: filtering, imagining, one step, two models stacked.

Weights are float32; the dtype of a case is that of the products. Samples come from fixed noise.
E is the encoder's width at depth 48 or 16; A = 0 is action-free.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from apv_fast import ops
from apv_fast.nn import RSSM
from apv_fast.structure import State
from bench.registry import FORWARD, FORWARD_BACKWARD, WIDER, Problem, case, differentiable

DTYPES = (torch.float32, torch.bfloat16)
FULL = {"deter": 1024, "hidden": 1024, "stoch": 32, "discrete": 32}
NARROW = {"deter": 200, "hidden": 200, "stoch": 32, "discrete": 32}
SMALL = {"deter": 200, "hidden": 200, "stoch": 16, "discrete": 16}  # the preset "small"
TWO_SCANS = "two own scans"  # rssm_observe twice, the lower model's features in between
BATCHES, LENGTHS, WIDTHS = (1, 4, 16, 50), (1, 8, 25, 50), (200, 400, 600, 1024)  # around B=16, T=25, D=H=1024


def _model(device: torch.device, dtype: torch.dtype, embed: int, action: int, sizes: dict[str, int]) -> RSSM:
    return RSSM(embed, action, dtype=dtype, **sizes).to(device)  # type: ignore[arg-type]


def _noise(rssm: RSSM, *leading: int) -> Tensor:
    weight = rssm.gru.weight
    return ops.sample_noise(rssm.latent, *leading, dtype=torch.float32, device=weight.device)


def _sequence(device: torch.device, B: int, T: int, E: int, A: int) -> tuple[Tensor, Tensor, Tensor]:
    """``embed``, ``is_first`` with one start inside, ``action``."""
    is_first = torch.zeros(B, T, dtype=torch.bool, device=device)
    is_first[:, 0] = is_first[0, T // 2] = True
    return torch.randn(B, T, E, device=device).requires_grad_(), is_first, torch.rand(B, T, A, device=device) * 2 - 1


def _read_by_losses(post: State, prior: State) -> list[Tensor]:
    return [post["deter"], post["stoch"], post["logit"], prior["logit"]]


@case("rssm_observe", [{"B": 16, "T": 25, "E": 1536, "A": 0, **FULL}], dtypes=DTYPES, wider=WIDER, memory=True)
@case("rssm_observe", [{"B": 16, "T": 25, "E": 512, "A": 0, **NARROW}], dtypes=DTYPES, wider=WIDER)
@case("rssm_observe", [{"B": 8, "T": 25, "E": 512, "A": 0, **SMALL}])
@case("rssm_observe", [{"B": 50, "T": 50, "E": 1536, "A": 0, **FULL}], dtypes=DTYPES, wider=WIDER, slow=True)
def rssm_observe(device: torch.device, dtype: torch.dtype, B: int, T: int, E: int, A: int, **sizes: int) -> Problem:
    """Filter a batch; gradients of every weight and of the embedding."""
    rssm = _model(device, dtype, E, A, sizes)
    embed, is_first, action = _sequence(device, B, T, E, A)
    noise = (_noise(rssm, B, T), _noise(rssm, B, T))

    def forward(backend: str) -> list[Tensor]:
        states = ops.rssm_observe(
            rssm.params(), embed, is_first, action if A else None, latent=rssm.latent, noise=noise, backend=backend
        )
        return _read_by_losses(*states)

    return differentiable(forward, [embed, *rssm.parameters()], slow_to_compile=True)


def _sweep() -> list[dict[str, int]]:
    """B, T and D = H, one at a time."""
    middle = {"B": 16, "T": 25, "E": 1536, "A": 0, **FULL}
    changes = [{"B": batch} for batch in BATCHES] + [{"T": length} for length in LENGTHS]
    changes += [{"deter": width, "hidden": width} for width in WIDTHS]
    shapes = {tuple((middle | change).items()): middle | change for change in changes}
    return list(shapes.values())


@case("observe_sweep", _sweep(), dtypes=DTYPES, uses=("rssm_observe",))
def observe_sweep(device: torch.device, dtype: torch.dtype, **shape: int) -> Problem:
    """``rssm_observe`` with gradients over its sizes, for the plots of time against each."""
    both = rssm_observe(device, dtype, **shape)
    return Problem({FORWARD_BACKWARD: both.passes[FORWARD_BACKWARD]})


@case("stacked_observe", [{"B": 16, "T": 25, "E": 1536, "A": 4, **FULL}], dtypes=DTYPES)
@case("stacked_observe", [{"B": 8, "T": 25, "E": 512, "A": 6, **SMALL}])
@case("stacked_observe", [{"B": 50, "T": 50, "E": 1536, "A": 4, **FULL}], dtypes=DTYPES, slow=True)
def stacked_observe(device: torch.device, dtype: torch.dtype, B: int, T: int, E: int, A: int, **sizes: int) -> Problem:
    """Filter with both models; gradients of every weight of both and of the embedding."""
    lower = _model(device, dtype, E, 0, sizes)
    upper = _model(device, dtype, lower.feat_dim, A, sizes)
    embed, is_first, action = _sequence(device, B, T, E, A)
    af_noise, noise = ((_noise(rssm, B, T), _noise(rssm, B, T)) for rssm in (lower, upper))

    def two_scans() -> list[Tensor]:
        below = ops.rssm_observe(lower.params(), embed, is_first, None, latent=lower.latent, noise=af_noise)
        above = ops.rssm_observe(
            upper.params(), lower.feat(below[0]), is_first, action, latent=upper.latent, noise=noise
        )  # fmt: skip
        return _read_by_losses(*below) + _read_by_losses(*above)

    def forward(backend: str) -> list[Tensor]:
        if backend == TWO_SCANS:
            return two_scans()
        states = ops.stacked_observe(
            lower.params(), upper.params(), embed, is_first, action,
            af_latent=lower.latent, latent=upper.latent, af_noise=af_noise, noise=noise, backend=backend,
        )  # fmt: skip
        return _read_by_losses(states["af_post"], states["af_prior"]) + _read_by_losses(states["post"], states["prior"])

    leaves = [embed, *lower.parameters(), *upper.parameters()]
    problem = differentiable(forward, leaves, slow_to_compile=True)
    return dataclasses.replace(problem, rivals=(TWO_SCANS,))


@case("rssm_imagine", [{"B": 400, "T": 15, "A": 4, **FULL}], dtypes=DTYPES)
@case("rssm_imagine", [{"B": 200, "T": 15, "A": 6, **SMALL}])
@case("rssm_imagine", [{"B": 2500, "T": 15, "A": 4, **FULL}], dtypes=DTYPES, slow=True)
def rssm_imagine(device: torch.device, dtype: torch.dtype, B: int, T: int, A: int, **sizes: int) -> Problem:
    """Roll out along given actions; gradients of the actions only, as behaviour learning wants them."""
    rssm = _model(device, dtype, 1, A, sizes).requires_grad_(False)
    start = {key: torch.randn_like(value) for key, value in rssm.initial(B).items()}
    action = (torch.rand(B, T, A, device=device) * 2 - 1).requires_grad_()
    noise = _noise(rssm, B, T)

    def forward(backend: str) -> list[Tensor]:
        prior = ops.rssm_imagine(rssm.params(), start, action, latent=rssm.latent, noise=noise, backend=backend)
        return [prior["deter"], prior["stoch"]]

    return differentiable(forward, [action], slow_to_compile=True)


@case("rssm_step", [{"B": 1, "E": 1536, "A": 4, **FULL}], dtypes=DTYPES)
def rssm_step(device: torch.device, dtype: torch.dtype, B: int, E: int, A: int, **sizes: int) -> Problem:
    """One filtering step, as when acting: forward only."""
    rssm = _model(device, dtype, E, A, sizes)
    state, is_first = rssm.initial(B), torch.zeros(B, dtype=torch.bool, device=device)
    embed, action = torch.randn(B, E, device=device), torch.rand(B, A, device=device)
    noise = (_noise(rssm, B), _noise(rssm, B))

    def forward(backend: str) -> list[Tensor]:
        states = ops.rssm_step(
            rssm.params(), state, action, embed, is_first, latent=rssm.latent, noise=noise, backend=backend
        )
        return _read_by_losses(*states)

    both = differentiable(forward, list(rssm.parameters()))
    return dataclasses.replace(both, passes={FORWARD: both.passes[FORWARD]})

"""Filtering a batch of videos: the scan of the posterior."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from apv_fast import ops
from bench.cases.parts.rssm import DTYPES, FULL, NARROW, SMALL, Batch, Model, paper, phases, read_by_losses
from bench.registry import (
    BF16,
    COLD,
    COMPILED,
    FORWARD_BACKWARD,
    FP32,
    TF32,
    WIDER,
    OnDevice,
    Other,
    Passes,
    Problem,
    both_passes,
    case,
    differentiable,
)
from bench.rivals import hoisted, scanned

OP = "rssm_observe"
SCANNED = COMPILED + " of a scan"
LSTM = "cuDNN LSTM float16"  # hidden 1024: a yardstick, less work than a posterior step
BATCHES, LENGTHS, WIDTHS = (1, 4, 16, 50), (1, 8, 25, 50), (200, 400, 600, 1024)  # around B=16, T=25, D=H=1024


@case(OP, [{"B": 16, "T": 25, "E": 1536, "A": 0, **FULL}], dtypes=DTYPES, wider=WIDER, memory=True)
@case(OP, [{"B": 16, "T": 25, "E": 512, "A": 0, **NARROW}], dtypes=DTYPES, wider=WIDER)
@case(OP, [{"B": 8, "T": 25, "E": 512, "A": 0, **SMALL}])
@case(OP, paper([50], A=0), dtypes=DTYPES, wider=WIDER, slow=True)
def rssm_observe(device: torch.device, dtype: torch.dtype, B: int, T: int, E: int, A: int, **sizes: int) -> Problem:
    """Gradients of every weight and of the embedding."""
    return _problem(Model(device, dtype, E, A, sizes, B, T), Batch(device, B, T, E, A))


def _problem(model: Model, batch: Batch) -> Problem:
    action = batch.action if batch.action.shape[-1] else None

    def forward(backend: str) -> list[Tensor]:
        noise = model.noise_for(backend)
        states = ops.rssm_observe(
            model.params(), batch.embed, batch.is_first, action, latent=model.latent, noise=noise, backend=backend
        )
        return read_by_losses(*states)

    return differentiable(forward, [batch.embed, *model.leaves()], slow_to_compile=True)


def _sweep() -> list[dict[str, int]]:
    """B, T and D = H, one at a time."""
    middle = {"B": 16, "T": 25, "E": 1536, "A": 0, **FULL}
    changes = [{"B": batch} for batch in BATCHES] + [{"T": length} for length in LENGTHS]
    changes += [{"deter": width, "hidden": width} for width in WIDTHS]
    shapes = {tuple((middle | change).items()): middle | change for change in changes}
    return list(shapes.values())


@case("observe_sweep", _sweep(), dtypes=DTYPES, uses=(OP,))
def observe_sweep(device: torch.device, dtype: torch.dtype, **shape: int) -> Problem:
    """``rssm_observe`` with gradients over its sizes, for the plots of time against each."""
    both = rssm_observe(device, dtype, **shape)
    return Problem({FORWARD_BACKWARD: both.passes[FORWARD_BACKWARD]})


@case(OP, paper([16, 50], A=0), dtypes=(BF16, TF32, FP32), bench=False, device=OnDevice(150, (COLD,)))
def on_device(device: torch.device, dtype: torch.dtype, B: int, T: int, E: int, A: int, **sizes: int) -> Problem:
    """The op alone, action-free; in bfloat16 against PyTorch's compiled loops and a yardstick too."""
    model, batch = Model(device, dtype, E, A, sizes, B, T, alone=True), Batch(device, B, T, E, A)
    problem = _problem(model, batch)
    others = phases(OP, problem)
    if dtype == BF16:
        others[SCANNED] = Other(functools.partial(_compiled_scan, model, batch))  # the strongest rival first
        others[COMPILED] = Other(functools.partial(_compiled_steps, model, batch))
        others[LSTM] = Other(functools.partial(_lstm, device, B, T, sizes["deter"]), graph=False)
    return replace(problem, others=others)


def _lstm(device: torch.device, batch: int, length: int, width: int) -> Passes:
    lstm = torch.nn.LSTM(width, width, batch_first=True).to(device, torch.float16)
    x = torch.randn(batch, length, width, device=device, dtype=torch.float16).requires_grad_()
    return both_passes(lambda: [lstm(x)[0]], [x, *lstm.parameters()])


def _compiled_steps(model: Model, batch: Batch) -> Passes:
    """A Python loop around one compiled step, all hoisted that can be."""
    step = torch.compile(hoisted.step, dynamic=False, fullgraph=True)

    def scan() -> list[Tensor]:
        deter, stoch, logit, _, prior = hoisted.observe(
            step, model.params(), batch.embed, batch.is_first, None, model.latent, *model.noise
        )
        return [deter, stoch, logit, prior]

    return both_passes(scan, [batch.embed, *model.leaves()])


def _compiled_scan(model: Model, batch: Batch) -> Passes:
    """PyTorch's own scan, compiled as a whole."""
    scanned.check()
    whole = scanned.compiled(scanned.observe)

    def scan() -> list[Tensor]:
        start = hoisted.zeros(model.params(), model.latent, len(batch.embed))
        inputs = (model.params(), batch.embed, batch.is_first, None, model.latent, *model.noise, start)
        deter, stoch, logit, _, prior = cast("list[Tensor]", whole(*inputs))
        return [deter, stoch, logit, prior]

    return both_passes(scan, [batch.embed, *model.leaves()])

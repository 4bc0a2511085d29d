"""Problems for ``rssm_rollout``: a model, an actor and where they start; how exact backends are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apv_fast import ops
from apv_fast.backend import IMPLEMENTATIONS, probe
from apv_fast.ops import ActorParams, RSSMParams
from tests.support.rssm_cases import (
    Sizes,
    Tensors,
    make_params,
)
from tests.support.rssm_errors import REFERENCE_ERROR, relative_errors
from tests.support.yardstick import VARIATION, judge, least, seed_of, yardsticks

BACKENDS = [name for name in IMPLEMENTATIONS["rssm_rollout"] if probe(name).available]
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """A model, an actor and a roll-out; ``sizes.batch`` start states, ``sizes.length`` steps."""

    sizes: Sizes
    discrete: bool = False
    layers: int = 2
    units: int = 5


CASES = {
    "odd": Case(Sizes(3, 3, 1, 2, 3, 9, 5, 3, 7)),
    "one-hot actions": Case(Sizes(2, 3, 1, 3, 4, 7, 6, 2, 4), discrete=True),
    "gaussian": Case(Sizes(2, 3, 1, 1, 2, 5, 4, 3, 0), layers=1),
    "more rows than a tile": Case(Sizes(19, 2, 1, 2, 2, 33, 70, 17, 4), layers=3, units=66),
    "a variable wider than a tile": Case(Sizes(2, 2, 1, 2, 2, 4, 3, 2, 40)),
}


def make(case: Case, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> Tensors:
    """Every tensor by name; noise decides all one-hot samples, whatever the rounding."""
    generator, s = torch.Generator().manual_seed(seed_of(seed)), case.sizes

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def one_hot_noise(*shape: int) -> Tensor:
        return 100.0 * F.one_hot(torch.randint(shape[-1], shape[:-1], generator=generator), shape[-1]).double()

    tensors = {f"params.{name}": w for name, w in make_params(s, generator)._asdict().items()}
    width = s.feat
    for i in range(case.layers):
        tensors |= {
            f"actor.{2 * i:02}": randn(case.units, width) / width**0.5,
            f"actor.{2 * i + 1:02}": randn(case.units),
        }
        width = case.units
    for i in range(1 if case.discrete else 2):
        tensors |= {f"actor.head{i}": randn(s.action, width) / width**0.5, f"actor.head{i} bias": randn(s.action)}
    leading = (s.length, s.batch)
    tensors["deter"] = randn(s.batch, s.deter).tanh()
    tensors["stoch"] = randn(s.batch, s.stoch, s.discrete) if s.discrete else randn(s.batch, s.stoch)
    tensors["noise"] = one_hot_noise(*leading, s.stoch, s.discrete) if s.discrete else randn(*leading, s.stoch)
    uniform = torch.rand(*leading, s.action, generator=generator, dtype=torch.float64)
    tensors["action_noise"] = one_hot_noise(*leading, s.action) if case.discrete else uniform
    return {name: x.to(device, dtype) for name, x in tensors.items()}


def under(tensors: Tensors, prefix: str) -> list[Tensor]:
    return [x for name, x in tensors.items() if name.startswith(prefix)]


def rollout(tensors: Tensors, case: Case, backend: str | None, **changes: Any) -> Tensors:
    """Outputs of the op by name."""
    options: dict[str, Any] = {
        "horizon": case.sizes.length,
        "latent": case.sizes.latent,
        "noise": tensors["noise"],
        "action_noise": tensors["action_noise"],
        "backend": backend,
    }
    states, action = ops.rssm_rollout(
        RSSMParams(*under(tensors, "params.")),
        ActorParams.of(under(tensors, "actor."), case.discrete),
        {"deter": tensors["deter"], "stoch": tensors["stoch"]},
        **options | changes,
    )
    return {**states, "action": action}


def run(tensors: Tensors, case: Case, backend: str) -> Tensors:
    """Outputs, and the gradients of Σ output·cotangent under "grad NAME"."""
    leaves = {
        name: x.detach().requires_grad_() for name, x in tensors.items() if name.startswith(("actor", "deter", "stoch"))
    }
    outputs = rollout(tensors | leaves, case, backend)
    generator = torch.Generator().manual_seed(99)
    loss = torch.zeros((), dtype=torch.float64)
    for name in sorted(outputs):
        cotangent = torch.randn(outputs[name].shape, generator=generator, dtype=torch.float64)
        loss = loss + (outputs[name].double().cpu() * cotangent).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    grad_in = {f"grad {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {name: x.detach() for name, x in outputs.items()} | grad_in


def compare(case: Case, backend: str, dtype: torch.dtype, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """Relative errors of backend and reference in this dtype against a float64 run."""
    tensors = make(case, dtype, seed, probe(backend).devices[-1])
    expected = run({name: x.double() for name, x in tensors.items()}, case, "reference")
    plain = yardsticks(lambda: run(tensors, case, "reference"), backend)
    return relative_errors(run(tensors, case, backend), expected), least(
        relative_errors(own, expected) for own in plain
    )


def assert_exact(backend: str, case: Case, dtype: torch.dtype, tiny: bool = False) -> None:
    """Values and gradients, see :func:`~tests.support.yardstick.judge`; ``tiny``: as in ``rssm_errors.measure``."""

    def measure(seed: int) -> dict[str, tuple[float, float]]:
        got, reference = compare(case, backend, dtype, seed)
        # That PyTorch itself is near is held for the numbers of every day: others may be ill-conditioned.
        for name, error in () if tiny or VARIATION else reference.items():
            assert error <= REFERENCE_ERROR[dtype], f"reference {name}: {error:.2e}"
        return {name: (error, reference[name]) for name, error in got.items()}

    judge(measure, dtype, exact=backend != "reference", vanishing=1 in (case.sizes.deter, case.sizes.hidden))

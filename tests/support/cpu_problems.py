"""One problem of each op that has a CPU kernel, under one signature: for what every kernel must do alike."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from apv_fast.backend import IMPLEMENTATIONS
from apv_fast.ops import knn_bonus, normalize_image, video_bonus
from apv_fast.optim import KerasAdam
from tests.ops import (
    image_loss_problems,
    image_model_problems,
    kl_balance_problems,
    lambda_return_problems,
    mlp_problems,
    rssm_rollout_problems,
)
from tests.support import rssm_errors
from tests.support.rssm_cases import SIZES, Sizes, Tensors, make_case
from tests.support.yardstick import seed_of

Results = dict[str, Tensor]

# Odd sizes; and sizes of several panels and blocks, from which on work is split among threads.
SMALL, LARGE = SIZES["odd"], Sizes(19, 5, 65, 4, 7, 200, 140, 9, 13)


@dataclass(frozen=True)
class Problem:
    """Tensors by name, and what computes outputs and gradients from them on a backend."""

    tensors: Tensors
    call: Callable[[Tensors, str], Results]

    def run(self, backend: str) -> Results:
        """The same at every call."""
        return self.call(self.tensors, backend)

    def exact(self) -> Results:
        """The reference's results in float64, from the same numbers."""
        return self.call({n: x.double() if x.is_floating_point() else x for n, x in self.tensors.items()}, "reference")


Build = Callable[[torch.dtype, bool], Problem]  # dtype, whether it is to be large


def _named(tensors: Iterable[Tensor]) -> Results:
    return {str(i): x.detach() for i, x in enumerate(tensors)}


def _leaves(tensors: Tensors, prefix: str = "") -> list[Tensor]:
    return [x.detach().requires_grad_() for name, x in tensors.items() if name.startswith(prefix)]


def _normal(dtype: torch.dtype, **shapes: tuple[int, ...]) -> Tensors:
    generator = torch.Generator().manual_seed(seed_of(0))
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def _rssm(case: str, **changes: int) -> Build:
    def build(dtype: torch.dtype, large: bool) -> Problem:
        sizes = replace(LARGE if large else SMALL, **changes)
        tensors = make_case(case, sizes, dtype)
        return Problem(tensors, lambda tensors, backend: rssm_errors.run(case, tensors, sizes, backend))

    return build


def _rollout(dtype: torch.dtype, large: bool) -> Problem:
    sizes = Sizes(150, 3, 1, 3, 4, 130, 70, 5, 11) if large else rssm_rollout_problems.CASES["odd"].sizes
    case = rssm_rollout_problems.Case(sizes, units=70 if large else 5)
    return Problem(
        rssm_rollout_problems.make(case, dtype),
        lambda tensors, backend: rssm_rollout_problems.run(tensors, case, backend),
    )


def _mlp(dtype: torch.dtype, large: bool) -> Problem:
    x, layers, cotangent = mlp_problems.inputs(*((401, [70, 200, 65]) if large else (7, [5, 3, 2])), dtype)
    weights = {f"w{i}": w for i, w in enumerate(itertools.chain(*layers))}

    def call(tensors: Tensors, backend: str) -> Results:
        (x,), flat = _leaves(tensors, "x"), _leaves(tensors, "w")
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        return _named(mlp_problems.run(x, pairs, tensors["cotangent"], backend))

    return Problem({"x": x, **weights, "cotangent": cotangent}, call)


def _knn_bonus(dtype: torch.dtype, large: bool) -> Problem:
    queries, keys, width = (700, 500, 33) if large else (7, 9, 3)
    tensors = _normal(dtype, query=(queries, width), keys=(keys, width))
    return Problem(tensors, lambda x, backend: {"bonus": knn_bonus(x["query"], x["keys"], k=5, backend=backend)})


def _video_bonus(dtype: torch.dtype, large: bool) -> Problem:
    batch, width = (40, 70) if large else (2, 5)
    tensors = _normal(dtype, af_feat=(batch, 9, width), projection=(width, 6))
    tensors |= {"queue": torch.zeros(300, 6, dtype=dtype), "filled": torch.tensor(0)}
    return Problem(tensors, lambda x, backend: _named(video_bonus(*x.values(), backend=backend)))


def _lambda_return(dtype: torch.dtype, large: bool) -> Problem:
    return Problem(
        lambda_return_problems.inputs((15, 2500) if large else (3, 7), dtype, "cpu"), lambda_return_problems.run
    )


def _kl(kind: str) -> Build:
    def build(dtype: torch.dtype, large: bool) -> Problem:
        def call(tensors: Tensors, backend: str) -> Results:
            leaves = tuple(_leaves(tensors))
            loss, value = kl_balance_problems.call(kind, leaves, backend, **kl_balance_problems.SETTINGS)
            return _named([loss, value, *torch.autograd.grad(loss, leaves)])

        return Problem(
            _named(kl_balance_problems.inputs(kind, (30, 11, 12, 33) if large else (3, 5, 2, 7), dtype)), call
        )

    return build


def _image_loss(dtype: torch.dtype, large: bool) -> Problem:
    mean, image = image_loss_problems.inputs((9, 64, 64, 3) if large else (2, 3, 5, 3), dtype, "cpu")

    def call(tensors: Tensors, backend: str) -> Results:
        (mean,) = _leaves(tensors, "mean")
        return _named(image_loss_problems.run(mean, tensors["image"], backend, -2.5))

    return Problem({"mean": mean, "image": image}, call)


def _normalize_image(dtype: torch.dtype, large: bool) -> Problem:
    _, image = image_loss_problems.inputs((9, 64, 64, 3) if large else (2, 3, 5, 3), dtype, "cpu")

    def call(tensors: Tensors, backend: str) -> Results:
        wanted = torch.float64 if tensors["like"].dtype == torch.float64 else dtype
        return {"image": normalize_image(tensors["image"], wanted, backend=backend)}

    return Problem({"image": image, "like": torch.empty(0, dtype=dtype)}, call)


def _image_model(kind: str) -> Build:
    def build(dtype: torch.dtype, large: bool) -> Problem:
        x, layers, cotangent = image_model_problems.case(kind, (7, 16, 3, 40) if large else (2, 3, 3, 9), dtype)
        tensors = {"x": x.detach(), **{f"w{i:02}": w for i, w in enumerate(layers)}, "cotangent": cotangent}

        def call(tensors: Tensors, backend: str) -> Results:
            x, wanted = tensors["x"], torch.float64 if tensors["w00"].dtype == torch.float64 else dtype
            x = x.detach().requires_grad_() if x.is_floating_point() else x
            weights = _leaves(tensors, "w")
            return _named(image_model_problems.run(kind, x, weights, tensors["cotangent"], wanted, backend))

        return Problem(tensors, call)

    return build


def _adam(dtype: torch.dtype, large: bool) -> Problem:
    """Three steps; moments of half precision are nothing that anybody trains with."""
    shapes = ((700, 300), (5,)) if large else ((3, 4), (5,))
    wanted = torch.float32 if dtype.itemsize < 4 else dtype
    tensors = _normal(wanted, **{f"{kind}{i}": shape for kind in "wabc" for i, shape in enumerate(shapes)})

    def call(tensors: Tensors, backend: str) -> Results:
        weights = [w.detach().clone().requires_grad_() for w in _leaves(tensors, "w")]
        adam = KerasAdam(weights, lr=0.05, eps=0.01, clip=3.0, weight_decay=0.02, backend=backend)
        norms = []
        for kind in "abc":
            for w, g in zip(weights, _leaves(tensors, kind), strict=True):
                w.grad = g.detach().clone()
            norms.append(adam.step())
        return _named([*weights, *norms])

    return Problem(tensors, call)


# op -> problems by name.
PROBLEMS: dict[str, dict[str, Build]] = {
    "image_decoder": {"": _image_model("decoder")},
    "image_encoder": {"bytes": _image_model("bytes"), "floats": _image_model("images")},
    "image_loss": {"": _image_loss},
    "keras_adam": {"": _adam},
    "kl_balance": {"": _kl("categorical")},
    "kl_balance_normal": {"": _kl("normal")},
    "knn_bonus": {"": _knn_bonus},
    "lambda_return": {"": _lambda_return},
    "mlp": {"": _mlp},
    "normalize_image": {"": _normalize_image},
    "rssm_imagine": {"": _rssm("imagine")},
    "rssm_observe": {"": _rssm("observe"), "gaussian": _rssm("observe", discrete=0)},
    "rssm_rollout": {"": _rollout},
    "rssm_step": {"": _rssm("step", batch=3)},
    "stacked_observe": {"": _rssm("stacked")},
    "video_bonus": {"": _video_bonus},
}

# "policy" is no op but a class; tests/ops/test_policy.py has it.
OPS = [op for op, row in IMPLEMENTATIONS.items() if "cpu" in row and op != "policy"]
NAMES = [f"{op} {name}".strip() for op in OPS for name in PROBLEMS.get(op, ())]


def problem(name: str, dtype: torch.dtype, *, large: bool) -> Problem:
    """The problem of one of :data:`NAMES`."""
    op, _, variant = name.partition(" ")
    return PROBLEMS[op][variant](dtype, large)

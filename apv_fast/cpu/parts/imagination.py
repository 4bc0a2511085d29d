"""What ``rssm_imagine`` and ``rssm_rollout`` share: ``csrc/cpu/rssm_imagine/``, all steps in one call each way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from apv_fast import _C
from apv_fast.cpu.parts.call import how
from apv_fast.cpu.parts.product import product
from apv_fast.recurrence.imagination import OUTPUTS, ImagineCall, RolloutCall

Tensors = dict[str, Tensor]  # by their names in csrc/cpu/rssm_imagine/
_WEIGHTS = (
    *("img_in_weight", "img_in_bias", "gru_weight", "gru_bias", "norm_weight", "norm_bias"),
    *("img_out_weight", "img_out_bias", "dist_weight", "dist_bias"),
)


class Trace(NamedTuple):
    """What both ops leave, ``[N, T, ...]`` or ``[H, N, ...]``; the last four for the way back."""

    deter: Tensor  # D, the states' dtype
    stoch: Tensor  # L, the states' dtype
    stats: Tensor  # M, the states' dtype
    x: Tensor  # H, the weights' dtype: behind its activation
    parts: Tensor  # 3D, the weights' dtype
    y: Tensor  # H, the weights' dtype: behind its activation
    norm: Tensor  # 2, the states' dtype: LayerNorm's mean and 1/std


def empty_trace(call: ImagineCall | RolloutCall, leading: tuple[int, int]) -> Trace:
    """For ``leading`` rows and steps, or steps and rows."""
    narrow, wide = call.weights[0], call.state["deter"]
    hidden, deter = narrow.shape[0], wide.shape[1]
    outputs = [wide.new_empty(*leading, w) for w in (deter, call.width, call.weights[-1].shape[0])]
    kept = [narrow.new_empty(*leading, w) for w in (hidden, 3 * deter, hidden)]
    return Trace._make([*outputs, *kept, wide.new_empty(*leading, 2)])


def traced(trace: Trace, keep: bool) -> Tensors:
    """All of the trace by name or, without ``keep``, the outputs alone."""
    fields = list(trace._asdict().items())
    return {f"{name}_trace": x for name, x in (fields if keep else fields[:OUTPUTS])}


def noise_of(noise: Tensor | None, values: str = "noise", seed: str = "seed") -> Tensors:
    """By the name that its kind has."""
    if noise is None:
        return {}
    return {values if noise.is_floating_point() else seed: noise.contiguous()}


def grads_of(names: Sequence[str], grads: Sequence[Tensor | None]) -> Tensors:
    """Those that are there."""
    return {f"grad_{name}": g.contiguous() for name, g in zip(names, grads, strict=True) if g is not None}


def run(
    backward: bool,
    call: ImagineCall | RolloutCall,
    tensors: Mapping[str, Tensor],
    *,
    actions: int,
    units: Sequence[int] = (),
    min_std: float = 0.0,
    one_hot: bool = False,
) -> None:
    """One direction; ``tensors`` are contiguous, beside the weights, the start and the noise of latents."""
    weights, latent, (deter, stoch) = call.weights, call.latent, (call.state["deter"], call.state["stoch"])
    tensors = {**tensors, **{name: w.contiguous() for name, w in zip(_WEIGHTS, weights, strict=True)}}
    tensors |= {"start_deter": deter.contiguous(), "start_stoch": stoch.contiguous()} | noise_of(call.noise)
    rows, width = deter.shape
    if rows == 0:
        return
    sizes = {"steps": call.horizon, "rows": rows, "deter": width, "hidden": len(weights[0]), "stoch": latent.stoch}
    sizes |= {"discrete": latent.discrete, "inputs": weights[0].shape[1], "actions": actions}
    _C.imagine(
        backward=backward,
        sizes=sizes | {"one_hot_actions": one_hot, "batch_first": isinstance(call, ImagineCall)},
        units=units,
        latent_min_std=latent.min_std,
        min_std=min_std,
        tensors={name: x.data_ptr() for name, x in tensors.items()},
        **how(weights[0].dtype),
    )


def flat(x: Tensor) -> Tensor:
    """All rows and steps in one dimension."""
    return x.flatten(0, -2)


def over_steps(grad: Tensor, start: Tensor, states: Tensor, steps: int) -> Tensor:
    """Σ gradᵀ·(state before) over all rows and steps (along dimension ``steps``), ``[units, width]``."""
    first, rest = grad.narrow(steps, 0, 1), grad.narrow(steps, 1, grad.shape[steps] - 1)
    before = states.narrow(steps, 0, states.shape[steps] - 1)
    total = product(flat(first).T, start.to(grad.dtype))
    return total.add_(product(flat(rest).T, flat(before).to(grad.dtype))) if rest.numel() else total

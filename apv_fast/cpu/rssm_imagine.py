"""``rssm_imagine`` and ``rssm_rollout`` in C++: ``csrc/cpu/imagine.h``, all steps in one call each way.

The gradients of weights are products over all steps and rows afterwards. float16 runs on the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apv_fast import _C
from apv_fast.cpu.parts.call import how
from apv_fast.cpu.parts.product import product
from apv_fast.recurrence.imagination import OUTPUTS, ImagineCall, RolloutCall, define_imagine, define_rollout
from apv_fast.reference import rssm as reference_rssm
from apv_fast.reference import rssm_rollout as reference_imagination
from apv_fast.types import ActorParams, Latent, RSSMParams, State

Tensors = dict[str, Tensor]  # by their names in csrc/cpu/imagine.h
_WEIGHTS = (
    *("img_in_weight", "img_in_bias", "gru_weight", "gru_bias", "norm_weight", "norm_bias"),
    *("img_out_weight", "img_out_bias", "dist_weight", "dist_bias"),
)


class _Trace(NamedTuple):
    """What both ops leave, ``[N, T, ...]`` or ``[H, N, ...]``; the last four for the way back."""

    deter: Tensor  # D, the states' dtype
    stoch: Tensor  # L, the states' dtype
    stats: Tensor  # M, the states' dtype
    x: Tensor  # H, the weights' dtype: behind its activation
    parts: Tensor  # 3D, the weights' dtype
    y: Tensor  # H, the weights' dtype: behind its activation
    norm: Tensor  # 2, the states' dtype: LayerNorm's mean and 1/std


def _like(weights: Sequence[Tensor], wide: Tensor, leading: tuple[int, int], mixed: int) -> _Trace:
    """An empty trace; ``wide`` is a state."""
    narrow, hidden, deter = weights[0], weights[0].shape[0], wide.shape[1]
    outputs = [wide.new_empty(*leading, w) for w in (deter, mixed, weights[-1].shape[0])]
    kept = [narrow.new_empty(*leading, w) for w in (hidden, 3 * deter, hidden)]
    return _Trace._make([*outputs, *kept, wide.new_empty(*leading, 2)])


def _traces(trace: Mapping[str, Tensor]) -> Tensors:
    return {f"{name}_trace": x for name, x in trace.items()}


def _noise(noise: Tensor | None, values: str = "noise", seed: str = "seed") -> Tensors:
    if noise is None:
        return {}
    return {values if noise.is_floating_point() else seed: noise.contiguous()}


def _run(
    backward: bool,
    weights: Sequence[Tensor],
    call: ImagineCall | RolloutCall,
    tensors: Tensors,
    *,
    actions: int,
    units: Sequence[int] = (),
    min_std: float = 0.0,
    one_hot: bool = False,
) -> None:
    """One direction; ``tensors`` are contiguous, beside the weights, the start and the noise of latents."""
    rows, deter = call.deter.shape
    tensors = tensors | {name: w.contiguous() for name, w in zip(_WEIGHTS, weights, strict=True)}
    tensors |= {"start_deter": call.deter.contiguous(), "start_stoch": call.stoch.contiguous()} | _noise(call.noise)
    if rows == 0:
        return
    sizes = {"steps": call.horizon, "rows": rows, "deter": deter, "hidden": len(weights[0]), "stoch": call.S}
    sizes |= {"discrete": call.C, "inputs": weights[0].shape[1], "actions": actions, "one_hot_actions": one_hot}
    _C.imagine(
        backward=backward,
        sizes=sizes | {"batch_first": isinstance(call, ImagineCall)},
        units=units,
        latent_min_std=call.latent.min_std,
        min_std=min_std,
        tensors={name: x.data_ptr() for name, x in tensors.items()},
        **how(weights[0].dtype),
    )


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, -2)


def _over_steps(grad: Tensor, start: Tensor, states: Tensor, steps: int) -> Tensor:
    """Σ gradᵀ·(state before) over all rows and steps (along dimension ``steps``), ``[units, width]``."""
    first, rest = grad.narrow(steps, 0, 1), grad.narrow(steps, 1, grad.shape[steps] - 1)
    before = states.narrow(steps, 0, states.shape[steps] - 1)
    total = product(_flat(first).T, start.to(grad.dtype))
    return total.add_(product(_flat(rest).T, _flat(before).to(grad.dtype))) if rest.numel() else total


class _Imagine:
    """:class:`apv_fast.recurrence.imagination.Imagination`."""

    def forward(self, weights: list[Tensor], call: ImagineCall, keep: bool) -> list[Tensor]:
        trace = _like(weights, call.deter, (len(call.deter), call.horizon), call.width)
        kept = trace._asdict() if keep else dict(list(trace._asdict().items())[:OUTPUTS])
        _run(False, weights, call, _traces(kept) | self._action(weights, call), actions=self._actions(call))
        return list(kept.values())

    def backward(
        self,
        weights: list[Tensor],
        call: ImagineCall,
        trace: list[Tensor],
        grads: list[Tensor | None],
        of_stoch: bool,
        of_action: bool,
        of_weights: bool,
    ) -> list[Tensor]:
        own, narrow, wide = _Trace(*trace), weights[0], call.deter
        made: Tensors = {"dstart_deter": torch.zeros_like(wide, memory_format=torch.contiguous_format)}
        names = ("grad_deter", "grad_stoch", "grad_stats")
        given = {name: g.contiguous() for name, g in zip(names, grads, strict=True) if g is not None}
        if of_weights:
            made |= {f"d{n}": narrow.new_empty(getattr(own, n).shape) for n in ("x", "parts", "y", "stats")}
            made |= {f"dnorm_{n}": wide.new_zeros(3 * wide.shape[1]) for n in ("weight", "bias")}
        if of_stoch:
            made["dstart_stoch"] = wide.new_empty(call.stoch.shape)
        if of_action and call.action is not None:
            made["daction"] = wide.new_empty(call.action.shape)
        inputs = _traces(own._asdict()) | self._action(weights, call)
        _run(True, weights, call, inputs | given | made, actions=self._actions(call))
        nothing = wide.new_empty(0)
        d_action = made.get("daction", nothing)
        return [
            made["dstart_deter"],
            made.get("dstart_stoch", nothing),
            d_action if call.action is None else d_action.to(call.action.dtype),
            *(self._weight_grads(weights, call, own, made) if of_weights else (wide.new_empty(0) for _ in weights)),
        ]

    def kept(self, weights: Sequence[Tensor], call: ImagineCall) -> list[Tensor]:
        return list(_like(weights, call.deter, (call.deter.shape[0], call.horizon), call.width)[OUTPUTS:])

    @staticmethod
    def _actions(call: ImagineCall) -> int:
        return 0 if call.action is None else call.action.shape[-1]

    @staticmethod
    def _action(weights: list[Tensor], call: ImagineCall) -> Tensors:
        return {} if call.action is None else {"given_action": call.action.to(weights[0].dtype).contiguous()}

    def _weight_grads(self, weights: list[Tensor], call: ImagineCall, trace: _Trace, made: Tensors) -> list[Tensor]:
        """Of the ten weights, one product each over all rows and steps."""
        dtype, dx, dparts = weights[0].dtype, made["dx"], made["dparts"]
        dy, dstats = _flat(made["dy"]), _flat(made["dstats"])
        img_in = torch.zeros_like(weights[0], memory_format=torch.contiguous_format)
        img_in[:, : call.width] = _over_steps(dx, call.stoch.flatten(1), trace.stoch, 1)
        if call.action is not None:
            of_action = product(_flat(dx).T, _flat(call.action).to(dtype))
            img_in[:, call.width : call.width + call.action.shape[-1]] = of_action
        of_deter = _over_steps(dparts, call.deter, trace.deter, 1)
        return [
            *(img_in, _flat(dx).sum(0)),
            *(torch.cat([product(_flat(dparts).T, _flat(trace.x)), of_deter], 1), _flat(dparts).sum(0)),
            *(made["dnorm_weight"].to(dtype), made["dnorm_bias"].to(dtype)),
            *(product(dy.T, _flat(trace.deter).to(dtype)), dy.sum(0)),
            *(product(dstats.T, _flat(trace.y)), dstats.sum(0)),
        ]


class _Rollout:
    """:class:`apv_fast.recurrence.imagination.Rollout`."""

    def forward(self, weights: list[Tensor], actor: list[Tensor], call: RolloutCall, keep: bool) -> list[Tensor]:
        trace = _like(weights, call.deter, self._leading(call), call.width)
        action, head, *hidden = self._actor_like(weights, actor, call)
        outputs = trace._asdict() | {"head": head} if keep else dict(list(trace._asdict().items())[:OUTPUTS])
        tensors = _traces(outputs | {"action": action})
        tensors |= {f"layer_trace{i}": x for i, x in enumerate(hidden)} if keep else {}
        self._run(False, weights, actor, call, tensors)
        return [*trace[:OUTPUTS], action, *((*trace[OUTPUTS:], head, *hidden) if keep else ())]

    def backward(
        self,
        weights: list[Tensor],
        actor: list[Tensor],
        call: RolloutCall,
        trace: list[Tensor],
        grads: list[Tensor | None],
        of_stoch: bool,
        of_actor: bool,
    ) -> list[Tensor]:
        split, wide, narrow = len(_Trace._fields) + 1, call.deter, weights[0]
        own = _Trace(*trace[:OUTPUTS], *trace[OUTPUTS + 1 : split])
        head, *hidden = trace[split:]
        names = ("grad_deter", "grad_stoch", "grad_stats", "grad_action")
        tensors = {name: g.contiguous() for name, g in zip(names, grads, strict=True) if g is not None}
        tensors |= _traces(own._asdict() | {"head": head}) | {f"layer_trace{i}": x for i, x in enumerate(hidden)}
        made: Tensors = {"dstart_deter": torch.zeros_like(wide, memory_format=torch.contiguous_format)}
        if of_stoch:
            made["dstart_stoch"] = wide.new_empty(call.stoch.shape)
        if of_actor:
            made["dhead"] = narrow.new_empty(head.shape)
            made |= {f"dlayer{i}": torch.empty_like(x) for i, x in enumerate(hidden)}
        self._run(True, weights, actor, call, tensors | made)
        d_actor = [wide.new_empty(0) for _ in actor]
        if of_actor:
            of_hidden = [made[f"dlayer{i}"] for i in range(len(hidden))]
            d_actor = self._actor_grads(call, own, hidden, of_hidden, made["dhead"])
        return [made["dstart_deter"], made.get("dstart_stoch", wide.new_empty(0)), *d_actor]

    def kept(self, weights: Sequence[Tensor], actor: Sequence[Tensor], call: RolloutCall) -> list[Tensor]:
        trace = _like(weights, call.deter, self._leading(call), call.width)
        return [*trace[OUTPUTS:], *self._actor_like(weights, actor, call)[1:]]

    @staticmethod
    def _leading(call: RolloutCall) -> tuple[int, int]:
        return call.horizon, call.deter.shape[0]

    def _actor_like(self, weights: Sequence[Tensor], actor: Sequence[Tensor], call: RolloutCall) -> list[Tensor]:
        """Empty actions, heads and hidden layers."""
        params, leading = ActorParams.of(list(actor), call.discrete), self._leading(call)
        actions = params.out_bias.shape[0]
        heads = actions if call.discrete else 2 * actions
        hidden = [weights[0].new_empty(*leading, bias.shape[0]) for bias in params.trunk[1::2]]
        return [*(call.deter.new_empty(*leading, w) for w in (actions, heads)), *hidden]

    @staticmethod
    def _run(backward: bool, weights: list[Tensor], actor: list[Tensor], call: RolloutCall, tensors: Tensors) -> None:
        params = ActorParams.of(actor, call.discrete)
        weight, bias = params.out_weight, params.out_bias
        if params.std_weight is not None and params.std_bias is not None:  # one product for both heads
            weight, bias = torch.cat([weight, params.std_weight]), torch.cat([bias, params.std_bias])
        layers = {"head_weight": weight.contiguous(), "head_bias": bias.contiguous()}
        for i, (w, b) in enumerate(zip(params.trunk[::2], params.trunk[1::2], strict=True)):
            layers |= {f"layer_weight{i}": w.contiguous(), f"layer_bias{i}": b.contiguous()}
        tensors = tensors | layers | _noise(call.action_noise, "action_noise", "action_seed")
        _run(
            backward,
            weights,
            call,
            tensors,
            actions=len(params.out_bias),
            units=[len(b) for b in params.trunk[1::2]],
            min_std=call.min_std,
            one_hot=call.discrete,
        )

    @staticmethod
    def _actor_grads(
        call: RolloutCall, trace: _Trace, hidden: list[Tensor], grads: list[Tensor], of_head: Tensor
    ) -> list[Tensor]:
        """Of the tensors of :meth:`ActorParams.flat`, one product each over all rows and steps."""
        features = ((call.stoch.flatten(1), trace.stoch), (call.deter, trace.deter))
        made = [torch.cat([_over_steps(grads[0], *x, 0) for x in features], 1), _flat(grads[0]).sum(0)]
        for grad, below in zip(grads[1:], hidden[:-1], strict=True):
            made += [product(_flat(grad).T, _flat(below)), _flat(grad).sum(0)]
        d_head = _flat(of_head)
        weight, bias = product(d_head.T, _flat(hidden[-1])), d_head.sum(0)
        if call.discrete:
            return [*made, weight, bias]
        return [*made, *(part.clone() for pair in zip(weight.chunk(2), bias.chunk(2), strict=True) for part in pair)]


_imagine = define_imagine("cpu", _Imagine())
_rollout = define_rollout("cpu", _Rollout())


def rssm_imagine(
    params: RSSMParams, state: State, action: Tensor | None, horizon: int, latent: Latent, noise: Tensor | None
) -> State:
    """Roll the prior out; arguments and result as :func:`apv_fast.reference.rssm.rssm_imagine`, which see."""
    function: Callable[..., Any] = reference_rssm.rssm_imagine if _half(params) else _imagine
    result: State = function(params, state, action, horizon, latent, noise)
    return result


def rssm_rollout(
    params: RSSMParams,
    actor: ActorParams,
    state: State,
    horizon: int,
    latent: Latent,
    min_std: float,
    noise: Tensor,
    action_noise: Tensor,
) -> tuple[State, Tensor]:
    """Arguments and result as :func:`apv_fast.reference.rssm_rollout.rssm_rollout`, which see."""
    function: Callable[..., Any] = reference_imagination.rssm_rollout if _half(params) else _rollout
    result: tuple[State, Tensor] = function(params, actor, state, horizon, latent, min_std, noise, action_noise)
    return result


def _half(params: RSSMParams) -> bool:
    return params.gru_weight.dtype == torch.float16

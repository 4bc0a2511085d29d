"""Rivals around PyTorch's own loop, ``torch._higher_order_ops.scan``: one graph for all steps, as TorchRL compiles it.

The compiler sees one iteration, forward and backward, so the whole of a sequence compiles in the time of a few steps.
An iteration does several steps, at most :data:`UNROLL` (TorchRL's choice); what :mod:`bench.rivals.hoisted` hoists is
hoisted here too. The scan is a prototype of PyTorch's and some versions have given wrong gradients: :func:`check` runs
a small one first, and a rival whose scan is wrong or missing is left out with the reason.

Limits: as in :mod:`bench.rivals.hoisted`; a roll-out has continuous actions or one-hot ones, and frozen dynamics.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from apv_fast.nn.rssm import RSSM
from apv_fast.reference.rssm_rollout import act
from apv_fast.reference.rssm_step import feat, img_step
from apv_fast.types import ActorParams, Latent, RSSMParams, State
from bench.rivals import hoisted

UNROLL = 8  # steps an iteration at most
Tensors = tuple[Tensor, ...]
Body = Callable[[Tensors, Tensors], tuple[Tensors, Tensors]]  # (carry, x_t) -> carry, y_t


class ScanError(RuntimeError):
    """This version of PyTorch has no scan that can be used here."""


def unrolled(length: int, most: int = UNROLL) -> int:
    """How many steps an iteration does: the largest number up to ``most`` that divides ``length``."""
    return next(n for n in range(min(most, length), 0, -1) if length % n == 0)


def scan(body: Body, carry: Tensors, xs: Sequence[Tensor], most: int = UNROLL) -> Tensors:
    """``carry, y_t = body(carry, x_t)`` for every ``t``; ``xs [T, ...]`` to ``ys [T, ...]``.

    Raises:
        ScanError: PyTorch has no scan.
    """
    try:
        from torch._higher_order_ops.scan import scan as higher_order
    except ImportError as error:
        raise ScanError(f"torch {torch.__version__} has no torch._higher_order_ops.scan") from error
    length = len(xs[0])
    several = unrolled(length, most)

    def iteration(carry: Tensors, now: Tensors) -> tuple[Tensors, Tensors]:
        rows = []
        for i in range(several):
            carry, ys = body(carry, tuple(x[i] for x in now))
            rows.append(ys)
        # Nothing that goes out may be what came in or goes out twice, hence the copies.
        return tuple(x.clone() for x in carry), tuple(torch.stack(column) for column in zip(*rows, strict=True))

    grouped = tuple(x.unflatten(0, (length // several, several)) for x in xs)
    _, ys = higher_order(iteration, carry, grouped)
    return tuple(y.flatten(0, 1) for y in ys)


def observe(
    params: RSSMParams,
    embed: Tensor,  # [B, T, E]
    is_first: Tensor,  # [B, T]
    action: Tensor | None,  # [B, T, A]
    latent: Latent,
    noise: Tensor,  # [B, T, S, C]
    prior_noise: Tensor,
    start: tuple[Tensor, Tensor],  # zeros; with gradients, if the weights have them
    most: int = UNROLL,
) -> list[Tensor]:
    """``rssm_observe`` from zeros: deter, stoch, logit, prior's stoch and logit, ``[B, T, ...]``."""

    def body(carry: Tensors, now: Tensors) -> tuple[Tensors, Tensors]:
        x, obs, keep, step_noise = now
        deter, stoch = carry
        deter, stoch, logit = hoisted.step(params, x, obs, keep, deter, stoch, step_noise)
        return (deter, stoch), (deter, stoch, logit)

    xs = (*hoisted.before(params, embed, is_first, action, latent), noise)
    deters, stochs, logits = (y.movedim(0, 1) for y in scan(body, start, [x.movedim(1, 0) for x in xs], most))
    return [deters, stochs, logits, *hoisted.prior(params, deters, prior_noise)]


def rollout(
    params: RSSMParams,
    actor: ActorParams,
    state: State,  # deter [N, D], stoch [N, S, C]
    latent: Latent,
    min_std: float,
    noise: Tensor,  # [H, N, S, C]
    action_noise: Tensor,  # [H, N, A]
) -> tuple[State, Tensor]:
    """``rssm_rollout``: prior states and the actions before them, ``[H, N, ...]``."""

    def body(carry: Tensors, now: Tensors) -> tuple[Tensors, Tensors]:
        before = {"deter": carry[0], "stoch": carry[1]}
        action = act(actor, feat(before).detach(), min_std, now[1])
        after = img_step(params, before, action, latent, now[0])
        deter, stoch, logit = after["deter"], after["stoch"], after["logit"]
        return (deter, stoch), (deter, stoch, logit, action)

    start = tuple(differentiable(state[name], actor.out_bias) for name in ("deter", "stoch"))
    deter, stoch, logit, action = scan(body, start, (noise, action_noise))
    return {"deter": deter, "stoch": stoch, "logit": logit}, action


def differentiable(start: Tensor, weight: Tensor) -> Tensor:
    """The same numbers with a gradient, if ``weight`` has one: some versions' scans lose gradients without it."""
    return start + 0 * weight.sum()


def compiled(function: Callable[..., object], backend: str = "inductor") -> Callable[..., object]:
    """``torch.compile`` of something with a scan in it, as one graph."""
    # A scan becomes a loop that counts in a tensor on the host, and reads it.
    torch._dynamo.config.capture_scalar_outputs = True
    # Inductor (torch 2.13) takes what the backward loop adds up for dead and puts another result of the same size into
    # its memory: at T = 10 the gradient of obs_dist_weight was that of the action. In place of a weight of the loop's
    # (gru_norm's, in an update) it put that weight's gradient. Without reuse and without work in place it is right.
    unsafe = ("allow_buffer_reuse", "inplace_buffers")
    options: dict[str, Any] | None = dict.fromkeys(unsafe, False) if backend == "inductor" else None
    return torch.compile(function, backend=backend, dynamic=False, fullgraph=True, options=options)


@functools.cache
def check() -> None:
    """Run a small scan and its backward eagerly, in float64 on the CPU, against the loop.

    Raises:
        ScanError: PyTorch has no scan, or its values or gradients are wrong.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        rssm = RSSM(3, deter=4, hidden=5, stoch=2, discrete=3, action_pad=1, dtype=torch.float64)
    leaves = [w.detach().requires_grad_() for w in rssm.params()]
    params = RSSMParams(*leaves)
    embed = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator)
    is_first = torch.arange(4).eq(3).expand(2, 4)
    noise = torch.randn(2, 4, 2, 3, dtype=torch.float64, generator=generator)
    inputs = (params, embed, is_first, None, rssm.latent, noise, noise)
    with torch.enable_grad():
        right = hoisted.observe(hoisted.step, *inputs)
        try:
            values = observe(*inputs, hoisted.zeros(params, rssm.latent, 2), most=2)
            gradients = _gradients(values, leaves)
        except ScanError:
            raise
        except Exception as error:  # whatever a prototype may raise
            raise ScanError(f"torch {torch.__version__}'s scan: {type(error).__name__}: {error}") from error
        right_gradients = _gradients(right, leaves)
    for what, xs, ys in (("values", values, right), ("gradients", gradients, right_gradients)):
        if not all(torch.allclose(x, y, rtol=1e-9, atol=1e-12) for x, y in zip(xs, ys, strict=True)):
            raise ScanError(f"torch {torch.__version__}'s scan gives wrong {what}")


def _gradients(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> Sequence[Tensor]:
    """Of a sum with different weights, so that no two outputs can take each other's place."""
    total = torch.stack([(index + 1) * output.cos().sum() for index, output in enumerate(outputs)]).sum()
    return torch.autograd.grad(total, leaves)

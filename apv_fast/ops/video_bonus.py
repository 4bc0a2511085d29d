"""APV's video-based intrinsic bonus with its queue, as one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from apv_fast.ops.check import Arguments
from apv_fast.ops.op import Op


class Bonus(NamedTuple):
    """Checked arguments."""

    af_feat: Tensor  # [B, T, F]
    projection: Tensor  # [F, d]
    queue: Tensor  # [N, d]
    filled: Tensor  # [] int64
    window: int
    k: int
    reduce: str
    exclude_self: bool


def like_bonus(call: Bonus, _: bool) -> list[Tensor]:
    """Empty bonus, queue and count."""
    bonus = call.queue.new_empty(call.af_feat.shape[0], call.af_feat.shape[1] - call.window + 1)
    queue = torch.empty_like(call.queue, memory_format=torch.contiguous_format)
    return [bonus, queue, torch.empty_like(call.filled)]


OP: Op[Bonus, Sequence[Tensor]] = Op(
    "video_bonus", Bonus, decides=lambda call: call.projection, returns="(Tensor, Tensor, Tensor)"
)


def video_bonus(
    af_feat: Tensor,
    projection: Tensor,
    queue: Tensor,
    filled: Tensor,
    *,
    window: int = 5,
    k: int = 16,
    reduce: Literal["mean", "kth"] = "mean",
    exclude_self: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Project feature windows, push them onto a queue, and measure their distance to their neighbours in it.

    Windows are means over ``window`` successive steps. All B·(T − window + 1) of them, batch-major, go to the front of
    the queue first; of more than it holds, the first ones stay. A window's neighbours are the min(k, filled) nearest
    rows of the filled part, itself included. No gradient flows through any output. Nothing waits for the device, so
    the op can be captured in a CUDA graph.

    Args:
        af_feat: ``[B, T, F]``, T ≥ window, any floating dtype; cast to the projection's.
        projection: ``[F, d]``, any floating dtype.
        queue: ``[N, d]``, the projection's dtype, newest row first; N ≥ 1.
        filled: int64 ``[]``, how many rows of the queue hold something, on the same device.
        window: τ, steps that are averaged.
        k: how many neighbours, at least 1.
        reduce: ``"mean"`` of their distances (the official code) or ``"kth"``, the largest (the paper).
        exclude_self: leave each window itself out of its neighbours. A window without any has the bonus 0.
        backend: see :mod:`apv_fast.backend`.

    Returns:
        The bonus ``[B, T − window + 1]`` in the projection's dtype, the new queue and the new count. The inputs are
        left as they are.

    Raises:
        TypeError: an argument is no tensor or has the wrong dtype.
        ValueError: shapes do not fit, N = 0, window or k < 1, fewer steps than a window, or an unknown ``reduce``.

    Source: Seo et al. 2022, section 3.3.
    """
    arguments = Arguments("video_bonus")
    arguments.tensor("af_feat", af_feat, "B T F")
    arguments.tensor("projection", projection, "F d")
    arguments.tensor("queue", queue, "N d", projection.dtype)
    arguments.tensor("filled", filled, "", torch.int64)
    arguments.require(len(queue) > 0, "queue has no rows; it must have at least one")
    arguments.require(window >= 1, f"window is {window}; it must be at least 1")
    arguments.require(
        af_feat.shape[1] >= window, f"af_feat has {af_feat.shape[1]} steps; it must have at least {window}"
    )
    arguments.require(k >= 1, f"k is {k}; it must be at least 1")
    arguments.require(reduce in ("mean", "kth"), f"reduce is {reduce!r}; it must be 'mean' or 'kth'")
    call = Bonus(af_feat, projection, queue, filled, window, k, reduce, exclude_self)
    bonus, new_queue, new_filled = OP(call, backend)
    return bonus, new_queue, new_filled

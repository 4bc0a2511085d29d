"""The whole video bonus without a host sync: a product, one launch that pushes, the three launches of ``knn_bonus``.

The mean over a window and the projection commute, so features are projected once (``[B·T, F]·[F, d]``, by PyTorch's
matrix product at its precision) and rows of d = 128 are averaged instead of rows of F = 2048. The push kernel does that
while it writes the new queue: row r < n is the mean of a window, later rows are the old queue moved by n. How much of
the queue is filled stays on the device.

Floor at B = T = 50, F = 2048, d = 128 in float32 on an H100: 20.5 MB of features read, 6 µs; 0.66 G FMAs, 22 µs of
issue slots; the push moves 2.1 + 2.1 + 1.3 MB, 2 µs; then the neighbours.
"""
# Kernels are Triton, not Python: arguments are pointers.
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def, no-untyped-call, assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from apv_fast.ops.op import Kernel
from apv_fast.ops.video_bonus import Bonus, like_bonus

from . import interpreting
from .knn_bonus import nearest
from .parts.knn_select import quotient
from .parts.tiles import on


@triton.jit
def push_kernel(
    projected, queue, filled, pushed, new_filled,  # [B·T, D], [N, D], [] int64, [max(rows, N), D], [] int64
    rows, size, windows, steps,  # rows = B·windows, size = N, windows and T a sequence
    queue_0, queue_1,  # strides, in elements
    D: tl.constexpr, WINDOW: tl.constexpr, ACC: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The window means, batch-major, then the old queue; all but the old queue contiguous."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = (column < D)[None, :]
    fresh = (row < rows)[:, None] & inside
    first = (row // windows * steps + row % windows).to(tl.int64)
    mean = tl.zeros([BR, BD], ACC)
    for i in range(WINDOW):
        mean += tl.load(projected + (first + i)[:, None] * D + column[None, :], fresh, other=0.0).to(ACC)
    mean = quotient(mean, tl.full([BR, BD], WINDOW, ACC))
    old = (row >= rows)[:, None] & (row < size)[:, None] & inside
    at = queue + (row - rows).to(tl.int64)[:, None] * queue_0 + column.to(tl.int64)[None, :] * queue_1
    value = tl.where(fresh, mean, tl.load(at, old, other=0.0).to(ACC))
    to = pushed + row.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(to, value.to(pushed.dtype.element_ty), fresh | old)
    if tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(new_filled, tl.minimum(tl.load(filled) + rows, size))


def _push(projected: Tensor, queue: Tensor, filled: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """New rows and after them the old queue, ``[max(rows, N), d]``, and how much of the queue is filled then."""
    batch, steps, d = projected.shape
    windows, size = steps - window + 1, len(queue)
    pushed = queue.new_empty(max(batch * windows, size), d)
    new_filled = torch.empty_like(filled)
    block = 512 if interpreting() else 8
    push_kernel[(triton.cdiv(len(pushed), block), max(1, triton.cdiv(d, 128)))](
        projected, queue, filled, pushed, new_filled, batch * windows, size, windows, steps, *queue.stride(),
        D=d, WINDOW=window, ACC=tl.float64 if queue.dtype == torch.float64 else tl.float32, BR=block, BD=128,
        num_warps=4,
    )  # fmt: skip
    return pushed, new_filled


def _forward(call: Bonus, keep: bool) -> list[Tensor]:
    """No host sync, so it can be captured in a graph."""
    batch, steps, _ = call.af_feat.shape
    queue, projection = call.queue, call.projection
    size, windows = len(queue), steps - call.window + 1
    with on(queue):
        projected = torch.mm(call.af_feat.to(projection.dtype).flatten(0, 1), projection)
        pushed, filled = _push(projected.unflatten(0, (batch, steps)), queue, call.filled, call.window)
        bonus = nearest(pushed[: batch * windows], pushed[:size], filled, call.k, call.reduce, call.exclude_self)
    return [bonus.to(queue.dtype).view(batch, windows), pushed[:size], filled]


video_bonus = Kernel("video_bonus_triton", Bonus, outputs=3, forward=_forward, fake=like_bonus)

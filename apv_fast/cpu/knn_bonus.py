"""``knn_bonus`` in C++: ``csrc/cpu/knn_bonus/``."""

from __future__ import annotations

import torch
from torch import Tensor

from apv_fast import _C
from apv_fast.cpu.parts.call import how
from apv_fast.ops.knn_bonus import KnnBonus, like_bonus
from apv_fast.ops.op import Kernel


def knn_bonus_and_memory(query: Tensor, keys: Tensor, k: int, reduce: str) -> tuple[Tensor, int]:
    """The bonus, and how many bytes of working memory it took."""
    result = query.new_empty(len(query), dtype=torch.promote_types(query.dtype, torch.float32))
    memory: int = _C.knn_bonus(
        query=query.data_ptr(),
        query_shape=query.shape,
        query_strides=query.stride(),
        keys=keys.data_ptr(),
        keys_shape=keys.shape,
        keys_strides=keys.stride(),
        out=result.data_ptr(),
        k=k,
        mean=reduce == "mean",
        **how(query.dtype),
    )
    return result.to(query.dtype), memory


_bonus = Kernel(
    "knn_bonus_cpu",
    KnnBonus,
    outputs=1,
    forward=lambda call, _: [knn_bonus_and_memory(*call)[0]],
    fake=like_bonus,
)


def knn_bonus(query: Tensor, keys: Tensor, k: int, reduce: str) -> Tensor:
    """Mean, or last, of the k smallest ``‖query − key‖₂``; ``[Q]``. ``apv_fast.ops`` has checked the arguments."""
    return _bonus(query, keys, k, reduce)[0]

"""Distance to the nearest neighbours, the core of APV's video-based intrinsic bonus."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from apv_fast.ops.check import Arguments
from apv_fast.ops.op import Op


class KnnBonus(NamedTuple):
    """Checked arguments."""

    query: Tensor  # [Q, d]
    keys: Tensor  # [N, d]
    k: int
    reduce: str


def like_bonus(call: KnnBonus, _: bool) -> list[Tensor]:
    """An empty bonus."""
    return [call.query.new_empty(call.query.shape[0])]


OP: Op[KnnBonus, Tensor] = Op("knn_bonus", KnnBonus, decides=lambda call: call.query)


def knn_bonus(
    query: Tensor,
    keys: Tensor,
    *,
    k: int = 16,
    reduce: Literal["mean", "kth"] = "mean",
    backend: str | None = None,
) -> Tensor:
    """Mean, or last, of the ``k`` smallest Euclidean distances from each query to the keys.

    No gradient flows through it. A key with a NaN counts as infinitely far; a query with a NaN gives NaN.

    Args:
        query: ``[Q, d]``, any floating dtype.
        keys: ``[N, d]``, the same dtype; N ≥ 1.
        k: how many neighbours, at least 1; more than N means N.
        reduce: ``"mean"`` of the k (the official code) or ``"kth"``, the k-th (the paper).
        backend: see :mod:`apv_fast.backend`.

    Returns:
        ``[Q]``, the query's dtype, in units of the features.

    Raises:
        TypeError: ``query`` or ``keys`` is no floating tensor, or their dtypes differ.
        ValueError: shapes do not fit, N = 0, k < 1 or an unknown ``reduce``.

    Source: Seo et al. 2022, section 3.3, equation 6.
    """
    arguments = Arguments("knn_bonus")
    arguments.tensor("query", query, "Q d")
    arguments.tensor("keys", keys, "N d", query.dtype)
    arguments.require(len(keys) > 0, "keys has no rows; there must be at least one (push the queries first)")
    arguments.require(k >= 1, f"k is {k}; it must be at least 1")
    arguments.require(reduce in ("mean", "kth"), f"reduce is {reduce!r}; it must be 'mean' or 'kth'")
    return OP(KnnBonus(query, keys, k, reduce), backend)

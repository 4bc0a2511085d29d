"""The C++ extension, from csrc/bindings.cpp. It may be missing: see apv_fast.cpu."""

from collections.abc import Mapping, Sequence

openmp: bool

def supported_isas() -> list[str]: ...
def knn_bonus(
    *,
    query: int,
    query_shape: Sequence[int],
    query_strides: Sequence[int],
    keys: int,
    keys_shape: Sequence[int],
    keys_strides: Sequence[int],
    out: int,
    k: int,
    mean: bool,
    dtype: str,
    threads: int,
    isa: str,
) -> int: ...
def dense(
    *,
    a: int,
    a_shape: Sequence[int],
    a_strides: Sequence[int],
    b: int,
    b_shape: Sequence[int],
    b_strides: Sequence[int],
    bias: int,
    out: int,
    elu: bool,
    threads: int,
    isa: str,
) -> None: ...
def rssm_scan(
    *,
    backward: bool,
    sizes: Sequence[int],
    min_std: float,
    weights: Sequence[Sequence[int]],
    addresses: Mapping[str, int],
    threads: int,
    dtype: str,
    isa: str,
) -> None: ...
def imagine(
    *,
    backward: bool,
    sizes: Mapping[str, int],
    units: Sequence[int],
    latent_min_std: float,
    min_std: float,
    tensors: Mapping[str, int],
    threads: int,
    dtype: str,
    isa: str,
) -> None: ...

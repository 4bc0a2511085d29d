"""The C++ extension, from csrc/module.cpp. It may be missing: see apv_fast.cpu."""

from collections.abc import Callable, Mapping, Sequence

openmp: bool

def supported_isas() -> list[str]: ...
def isa() -> str: ...
def has_amx() -> bool: ...
def share_out(*, parts: Sequence[Callable[[], object]], threads: int) -> None: ...
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
) -> int: ...
def dense(
    *,
    a: int,
    a_shape: Sequence[int],
    a_strides: Sequence[int],
    a_dtype: str,
    b: int,
    b_shape: Sequence[int],
    b_strides: Sequence[int],
    b_dtype: str,
    bias: int,
    out: int,
    out_stride: int,
    row_sums: int,
    elu: bool,
    threads: int,
) -> None: ...
def elu_backward(*, grad: int, y: int, out: int, sum: int, m: int, n: int, dtype: str, threads: int) -> None: ...
def onehot_gradient(
    *,
    grad: int,
    stoch: int,
    start: int,
    first: int,
    out: int,
    out_stride: int,
    sizes: Sequence[int],
    dtype: str,
    threads: int,
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
) -> None: ...
def sample(
    *,
    rows: int,
    stoch: int,
    discrete: int,
    min_std: float,
    stats: int,
    noise: int,
    seed: int,
    grad: int,
    out: int,
    threads: int,
    dtype: str,
) -> None: ...
def gumbel(*, count: int, seed: int, out: int, threads: int, dtype: str) -> None: ...
def keras_adam(
    *,
    weights: Sequence[int],
    gradients: Sequence[int],
    first: Sequence[int],
    second: Sequence[int],
    sizes: Sequence[int],
    size: float,
    eps: float,
    clip: float,
    decay: float,
    betas: Sequence[float],
    threads: int,
    dtype: str,
) -> float: ...
def kl_loss(
    *,
    sizes: Sequence[int],
    weights: Sequence[float],
    free: float,
    per_step: bool,
    p: Sequence[int],
    q: Sequence[int],
    results: Sequence[int],
    grad: int,
    grad_p: Sequence[int],
    grad_q: Sequence[int],
    threads: int,
    dtype: str,
) -> None: ...
def image(
    *,
    of_loss: bool,
    count: int,
    images: int,
    scale: float,
    constant: float,
    image: int,
    mean: int,
    loss: int,
    out: int,
    threads: int,
    dtype: str,
) -> None: ...
def lambda_return(
    *,
    horizon: int,
    n: int,
    lambda_: float,
    inputs: Sequence[int],
    out: int,
    grad: int,
    gradients: Sequence[int],
    threads: int,
    dtype: str,
) -> None: ...
def apply_function(*, name: str, count: int, from_: int, out: int, dtype: str) -> None: ...
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
) -> None: ...
def encoder_pass(
    *,
    shape: tuple[int, ...],
    image: int,
    bytes: bool,
    parameters: Sequence[int],
    outputs: Sequence[int],
    grad: int = 0,
    gradients: Sequence[int] = (),
    image_grad: int = 0,
    dtype: str,
    threads: int,
) -> None: ...
def decoder_pass(
    *,
    shape: tuple[int, ...],
    feat: int,
    parameters: Sequence[int],
    outputs: Sequence[int],
    grad: int = 0,
    gradients: Sequence[int] = (),
    feat_grad: int = 0,
    dtype: str,
    threads: int,
) -> None: ...

class FilterStep:
    def __init__(
        self,
        *,
        sizes: Sequence[Mapping[str, int]],
        latent_min_std: Sequence[float],
        weights: Sequence[Mapping[str, int]],
        dtype: str,
    ) -> None: ...
    def add_actor(
        self,
        *,
        layers: Sequence[tuple[int, int, int]],
        rows: int,
        head: tuple[int, int, int],
        actions: int,
        one_hot: bool,
        min_std: float,
    ) -> None: ...
    def run(
        self, rows: int, is_first: int, models: Sequence[Sequence[int]], actor: Sequence[int], threads: int
    ) -> None: ...

"""``knn_bonus`` on every backend and instruction set, against its definition in higher precision."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apv_fast.backend import probe
from apv_fast.ops import knn_bonus
from tests.support.yardstick import VARIATION, another, judge, seed_of

# The interpreter computes with NumPy, which remarks on infinities.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

CPU_BACKENDS = ["cpu scalar", "cpu avx2", "cpu avx512", "cpu avx512bf16"]
BACKENDS = ["reference", *CPU_BACKENDS, "triton"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
REDUCE: list[Literal["mean", "kth"]] = ["mean", "kth"]
SHAPES = [  # Q, N, d, k
    (0, 5, 3, 2),
    (1, 1, 1, 1),
    (1, 9, 5, 3),
    (7, 3, 4, 16),  # fewer keys than k
    (5, 6, 0, 2),
    (16, 32, 16, 16),
    (49, 33, 17, 16),
    (97, 131, 128, 16),
    (3, 300, 1030, 5),  # sums of many terms
    (40, 700, 3, 300),
    (700, 500, 9, 16),
]
INTERPRETED = [(0, 5, 3, 2), (5, 6, 0, 2), (7, 3, 4, 16), (20, 150, 70, 16), (3, 200, 300, 5), (6, 90, 3, 66)]
DATA = ["normal", "self", "offset", "near_duplicates", "duplicates", "tiny", "huge"]


def select_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend in a name of BACKENDS, whose instruction set is put into the environment."""
    backend, _, isa = name.partition(" ")
    if not probe(backend).available:
        pytest.skip(f"{backend}: {probe(backend).reason}")
    if isa:
        from apv_fast import _C

        if isa not in _C.supported_isas():
            pytest.skip(f"this CPU does not have {isa}")
        monkeypatch.setenv("APV_FAST_CPU_ISA", isa)
    return backend


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return select_backend(request.param, monkeypatch)


@pytest.fixture(params=CPU_BACKENDS)
def cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return select_backend(request.param, monkeypatch)


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def interpreted(backend: str) -> bool:
    """Whether it takes milliseconds a tile, so that a test had better be small."""
    return probe(backend).isa == "interpreter"


def on_device(backend: str, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to(probe(backend).devices[-1]) for tensor in tensors]


def inputs(data: str, q: int, n: int, d: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed_of(seed))
    keys = torch.randn(n, d, generator=generator, dtype=torch.float64)
    query = torch.randn(q, d, generator=generator, dtype=torch.float64)
    if data == "self":
        query = keys[torch.arange(q) % n]
    elif data == "offset":
        query, keys = query + 1e4, keys + 1e4
    elif data == "near_duplicates":
        keys = keys[:1] + 1e-3 * keys
        query = keys[torch.arange(q) % n]
    elif data == "duplicates":
        keys = keys[torch.arange(n) % 3]
    elif data in ("tiny", "huge"):  # squares that under- and overflow in float32
        scale = {"tiny": 1e-22, "huge": 1e22}[data] if dtype not in (torch.float16,) else 1.0
        query, keys = query * scale, keys * scale
    return query.to(dtype), keys.to(dtype)


def sorted_distances(query: Tensor, keys: Tensor) -> np.ndarray:
    """``[Q, N]`` in extended precision; NaN sorts last."""
    q, x = (tensor.double().numpy().astype(np.longdouble) for tensor in (query, keys))
    with np.errstate(invalid="ignore", over="ignore"):
        rows = [np.sort(np.sqrt(((x - row) ** 2).sum(-1))) for row in q]
    return np.array(rows, np.longdouble).reshape(len(q), len(x))


@functools.cache  # backends share it
def problem(data: str, q: int, n: int, d: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, np.ndarray]:
    with another(seed):
        query, keys = inputs(data, q, n, d, dtype)
    return query, keys, sorted_distances(query, keys)


def errors_of(
    query: Tensor, keys: Tensor, distances: np.ndarray, k: int, reduce: Any, backend: str
) -> tuple[float, float]:
    """The largest error, without those of one rounding, and the largest of PyTorch's exact differences."""
    query, keys = on_device(backend, query, keys)
    result = knn_bonus(query, keys, k=k, reduce=reduce, backend=backend).cpu()
    assert result.shape == (len(query),)
    assert result.dtype == query.dtype
    reference = knn_bonus(query, keys, k=k, reduce=reduce, backend="reference").cpu()
    with np.errstate(invalid="ignore"):
        nearest = distances[:, :k]
        expected = nearest.mean(-1) if reduce == "mean" else nearest[:, -1]
        errors = [np.abs(x.double().numpy().astype(np.longdouble) - expected) for x in (result, reference)]
    # Where the reference is not finite (NaN, infinity, overflow of its squares), the same is asked of the backend.
    finite = reference.isfinite().numpy()
    np.testing.assert_array_equal(result.double().numpy()[~finite], reference.double().numpy()[~finite])
    if not finite.any():
        return 0.0, 0.0
    error, own = (each[finite] for each in errors)
    rounding = torch.finfo(query.dtype).eps * np.abs(expected[finite])
    return float(np.where(error <= rounding, 0, error).max()), float(own.max())


def check(query: Tensor, keys: Tensor, distances: np.ndarray, k: int, reduce: Any, backend: str) -> None:
    """At most twice the error of PyTorch's exact differences in the same dtype, or one rounding to that dtype."""
    error, own = errors_of(query, keys, distances, k, reduce, backend)
    assert error <= 2 * own, (error, own)


@pytest.mark.statistical
@pytest.mark.interpreted("torch.float32")
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_definition(backend: str, dtype: torch.dtype, data: str) -> None:
    for i, (q, n, d, k) in enumerate(INTERPRETED if interpreted(backend) else SHAPES):
        for reduce in REDUCE[i % 2 :][:1] if interpreted(backend) else REDUCE:

            def measure(seed: int, sizes: Any = (q, n, d), k: int = k, reduce: str = reduce) -> Any:
                return {reduce: errors_of(*problem(data, *sizes, dtype, seed), k, reduce, backend)}

            judge(measure, dtype, exact=False, floors=dict.fromkeys(REDUCE, 0.0))


def test_long_sums(cpu: str) -> None:
    # One chain of 16384 float32 additions, as PyTorch has it, is off by 1e-6.
    query, keys = inputs("normal", 50, 60, 16384, torch.float32)
    expected = torch.from_numpy(sorted_distances(query, keys)[:, 15].astype(np.float64))
    error = knn_bonus(query, keys, k=16, reduce="kth", backend=cpu).double() / expected - 1
    assert error.square().mean().sqrt() < 4e-7


def transposed(x: Tensor) -> Tensor:
    return x.T.contiguous().T


def every_second(x: Tensor) -> Tensor:
    wide = x.new_full((2 * x.shape[0], 2 * x.shape[1] + 1), torch.nan)
    wide[::2, 1::2] = x
    return wide[::2, 1::2]


def padded_rows(x: Tensor) -> Tensor:
    wide = x.new_full((x.shape[0], x.shape[1] + 3), torch.nan)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


@pytest.mark.interpreted("torch.float32")
@pytest.mark.parametrize("layout", [transposed, every_second, padded_rows])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(backend: str, dtype: torch.dtype, layout: Any) -> None:
    query, keys = on_device(backend, *inputs("normal", 61, 77, 21, dtype))
    expected = knn_bonus(query, keys, k=5, backend=backend)
    assert torch.equal(knn_bonus(layout(query), keys, k=5, backend=backend), expected)
    assert torch.equal(knn_bonus(query, layout(keys), k=5, backend=backend), expected)
    one = keys[:1].expand(8, -1)  # stride 0
    assert torch.equal(knn_bonus(one, one, k=3, backend=backend), torch.zeros_like(one[:, 0]))


@pytest.mark.statistical
@pytest.mark.thorough
@settings(max_examples=60, deadline=None, derandomize=not VARIATION)
@given(
    shape=st.tuples(st.integers(0, 70), st.integers(1, 90), st.integers(0, 40), st.integers(1, 100)),
    dtype=st.sampled_from(DTYPES),
    data=st.sampled_from(DATA),
    reduce=st.sampled_from(REDUCE),
    name=st.sampled_from(BACKENDS[1:]),
    seed=st.integers(0, 2**16),
)
def test_any_shape(
    shape: tuple[int, int, int, int], dtype: torch.dtype, data: str, reduce: str, name: str, seed: int
) -> None:
    q, n, d, k = shape
    with pytest.MonkeyPatch.context() as monkeypatch:
        backend = select_backend(name, monkeypatch)
        query, keys = inputs(data, q, n, d, dtype, seed)
        check(query, keys, sorted_distances(query, keys), k, reduce, backend)


@pytest.mark.interpreted("torch.float32")
@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity(backend: str, dtype: torch.dtype, reduce: Any) -> None:
    clean = 4 if interpreted(backend) else 60
    query, keys = on_device(backend, *inputs("normal", 30, clean + 10, 6, dtype))
    expected = knn_bonus(query, keys[10:], k=4, reduce=reduce, backend=backend)
    keys[:10, 2] = torch.nan
    # A NaN key is never near while there is another ...
    assert torch.equal(knn_bonus(query, keys, k=4, reduce=reduce, backend=backend), expected)
    assert knn_bonus(query, keys, k=clean, reduce=reduce, backend=backend).isfinite().all()
    # ... and the result is NaN when there is none.
    for k in (clean + 1, clean + 10, 1000):
        assert knn_bonus(query, keys, k=k, reduce=reduce, backend=backend).isnan().all()
    # A key at infinity is infinitely far from all but infinite queries, from which it is NaN.
    keys[5:10] = torch.inf
    query[7] = torch.nan
    query[8] = torch.inf
    distances = sorted_distances(query.cpu(), keys.cpu())
    for k in (1, clean, clean + 1, clean + 5, clean + 6):
        check(query, keys, distances, k, reduce, backend)
        result = knn_bonus(query, keys, k=k, reduce=reduce, backend=backend)
        assert result[7].isnan()
        assert result[8].isposinf() if k <= clean else result[8].isnan()
        assert result[0].isfinite() if k <= clean else result[0].isposinf() if k <= clean + 5 else result[0].isnan()


def test_half_precision_numbers_are_read_exactly(cpu: str) -> None:
    # Every finite float16 and bfloat16, subnormals included, as the distance to 0 in one dimension.
    for dtype in (torch.float16, torch.bfloat16):
        numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
        numbers = numbers[numbers.isfinite()]
        squares = numbers.float() ** 2
        numbers = numbers[
            (squares > 1e-36) & squares.isfinite() | (numbers == 0)
        ]  # the square neither under- nor overflows
        assert len(numbers) > 30000
        distance = knn_bonus(numbers[:, None], torch.zeros(1, 1, dtype=dtype), k=1, backend=cpu)
        assert torch.equal(distance, numbers.abs())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_bits(cpu: str, dtype: torch.dtype, threads: Any) -> None:
    query, keys = inputs("self", 1000, 400, 33, dtype)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results += [knn_bonus(query, keys, backend=cpu) for _ in range(2)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_from_several_python_threads(cpu: str) -> None:
    problems = [inputs("normal", 200 + i, 300, 20, torch.float32, seed=i) for i in range(8)]
    expected = [knn_bonus(query, keys, backend=cpu) for query, keys in problems]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda problem: knn_bonus(*problem, backend=cpu), problems * 5))
    assert all(torch.equal(result, expected[i % 8]) for i, result in enumerate(results))


def test_registration(backend: str) -> None:
    query, keys = on_device(backend, *inputs("normal", 9, 14, 8, torch.float32))
    for reduce in REDUCE:
        torch.library.opcheck(torch.ops.apv_fast.knn_bonus.default, (query, keys, 4, reduce, backend))
    if backend != "reference":
        torch.library.opcheck(
            getattr(torch.ops.apv_fast, f"knn_bonus_{backend}").default, (query, keys, 4, "mean", False)
        )
    leaf = query.clone().requires_grad_()
    assert not knn_bonus(leaf, keys, backend=backend).requires_grad

    def function(query: Tensor, keys: Tensor) -> Tensor:
        return knn_bonus(query * 2, keys, k=4, backend=backend) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query, keys), function(query, keys))


def test_errors(backend: str) -> None:
    query, keys = on_device(backend, *inputs("normal", 4, 5, 3, torch.float32))
    with pytest.raises(ValueError, match="keys has no rows"):
        knn_bonus(query, keys[:0], backend=backend)
    with pytest.raises(ValueError, match="k is 0; it must be at least 1"):
        knn_bonus(query, keys, k=0, backend=backend)
    with pytest.raises(ValueError, match=r"keys has shape \(5, 2\).*d=3"):
        knn_bonus(query, keys[:, :2], backend=backend)
    with pytest.raises(TypeError, match=r"keys has dtype torch\.float64; it must be torch\.float32"):
        knn_bonus(query, keys.double(), backend=backend)
    with pytest.raises(ValueError, match="reduce is 'median'"):
        knn_bonus(query, keys, reduce="median", backend=backend)  # type: ignore[arg-type]


def test_instruction_set_from_the_environment(cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from apv_fast.cpu import probe as probe_now

    assert probe_now().isa == os.environ["APV_FAST_CPU_ISA"]
    monkeypatch.setenv("APV_FAST_CPU_ISA", "mmx")
    assert "unknown instruction set 'mmx'; must be one of: scalar, avx2, avx512, avx512bf16" in probe_now().reason
    with pytest.raises(ValueError, match="unknown instruction set 'mmx'"):
        knn_bonus(torch.zeros(1, 1), torch.zeros(1, 1), backend=cpu)

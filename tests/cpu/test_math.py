"""csrc/cpu/parts/math.h and noise.h on every instruction set: last places, special values, the same noise."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from apv_fast.backend import probe

if not probe("cpu").available:
    pytest.skip(f"cpu: {probe('cpu').reason}", allow_module_level=True)

from apv_fast import _C
from apv_fast.cpu.parts.latent import function
from apv_fast.ops.noise import sample_noise
from apv_fast.reference.noise import gumbel_noise, normal_noise, uniform_noise
from apv_fast.types import Latent

every_isa = pytest.mark.parametrize("isa", _C.supported_isas())
BOTH = [torch.float32, torch.float64]


@pytest.fixture
def forced(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APV_FAST_CPU_ISA", isa)


def _sigmoid(x: Tensor) -> Tensor:
    """Without underflow for large negative arguments, which torch.sigmoid has."""
    e = torch.exp(-x.abs())
    return torch.where(x < 0, e, 1) / (1 + e)


# What each is, and the error allowed in units in the last place.
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "exp": (torch.exp, 1.1),
    "expm1": (torch.expm1, 2.0),
    "log": (torch.log, 1.0),
    "tanh": (torch.tanh, 2.5),
    "sigmoid": (_sigmoid, 2.5),
    "sqrt": (torch.sqrt, 0.501),
    "elu": (lambda x: torch.where(x > 0, x, torch.expm1(x)), 1.1),
    "elu_grad": (lambda x: torch.where(x > 0, 1, x + 1), 0.501),
    "elu_grad_of_argument": (lambda x: torch.where(x > 0, 1, torch.exp(x)), 1.1),
}
LIMITS = [88.72283, 88.72284, -87.33655, -103.27, -103.28, -103.98, 0.5, 0.6, 3.4e38, 1e-38, 1e-45]
SPECIAL = [0.0, float("inf"), float("nan"), *LIMITS]


@functools.cache
def arguments() -> Tensor:
    """Any bits, and more of where the functions bend; float32."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (30_000,), generator=generator, dtype=torch.int32).view(torch.float32)
    spans = [100.0, 10.0, 2.0, 0.01]
    near = [span * (2 * torch.rand(8_000, generator=generator) - 1) for span in spans]
    return torch.cat([bits, *near, torch.tensor(SPECIAL), -torch.tensor(SPECIAL)])


@functools.cache
def exact(name: str) -> Tensor:
    return FUNCTIONS[name][0](arguments().double())


@every_isa
@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    x, bound = arguments(), FUNCTIONS[name][1]
    got, wanted = function(name, x), exact(name)
    rounded = wanted.float()
    finite = rounded.isfinite()
    assert torch.equal(got[~finite].nan_to_num(0.5), rounded[~finite].nan_to_num(0.5))
    assert torch.equal(got.signbit()[rounded == 0], rounded.signbit()[rounded == 0])
    size = rounded[finite].abs()
    unit = (torch.nextafter(size, torch.tensor(float("inf"))) - size).double()
    unit = torch.where(unit.isfinite(), unit, 2.0**104)  # of the largest number
    error = (got[finite].double() - wanted[finite]).abs() / unit
    assert error.max().item() <= bound, (x[finite][error.argmax()], error.max())


@every_isa
@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_doubles(name: str) -> None:
    x = arguments()[::50].double()
    torch.testing.assert_close(function(name, x), FUNCTIONS[name][0](x), rtol=4e-16, atol=1e-323, equal_nan=True)


@every_isa
@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("seed", [0, 123456789, -(2**62) - 98765432101])
@pytest.mark.parametrize("dtype", BOTH, ids=str)
def test_noise(seed: int, dtype: torch.dtype) -> None:
    """The uniforms' bits, the others to rounding; not a whole number of vectors."""
    key = torch.tensor(seed)
    # A result's dtype is that of what stands for the seed.
    got = {kind: function(f"{kind}_noise", _seed(key, 5004, dtype)) for kind in ("uniform", "gumbel", "normal")}
    assert torch.equal(got["uniform"], uniform_noise(key, 5004).to(dtype))
    torch.testing.assert_close(got["gumbel"], gumbel_noise(key, 5004).to(dtype), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(got["normal"], normal_noise(key, 5004).to(dtype), rtol=2e-6, atol=1e-6)


def _seed(key: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """``count`` numbers of ``dtype`` that begin with the seed's eight bytes."""
    numbers = torch.zeros(count, dtype=dtype)
    numbers.view(torch.int64)[0] = key
    return numbers


@pytest.mark.parametrize("isa", _C.supported_isas())
@pytest.mark.usefixtures("forced")
def test_drawn_noise() -> None:
    """Gumbel noise in float32 is made of a seed that the generator gives, on any number of threads."""
    before, latent = torch.get_num_threads(), Latent(3, 5)
    draws = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(1)
        draws.append(
            sample_noise(latent, 9, 1023, dtype=torch.float32, device=torch.device("cpu"), generator=generator)
        )
    torch.set_num_threads(before)
    assert all(torch.equal(draws[0], other) for other in draws[1:])
    seed = torch.randint(-(2**63), 2**63 - 1, (), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(draws[0], gumbel_noise(seed, 9, 1023, 3, 5), rtol=2e-6, atol=1e-6)
    wide = sample_noise(latent, 7, dtype=torch.float64, device=torch.device("cpu"), generator=generator.manual_seed(1))
    exponentials = torch.empty(7, 3, 5, dtype=torch.float64).exponential_(generator=generator.manual_seed(1))
    assert torch.equal(wide, -exponentials.log())


def test_noise_while_compiling() -> None:
    """A graph of its own: PyTorch draws."""
    draw = lambda: sample_noise(Latent(3, 5), 1, dtype=torch.float32, device=torch.device("cpu"))  # noqa: E731
    torch.manual_seed(0)
    got = torch.compile(draw, fullgraph=True, backend="eager")()
    torch.manual_seed(0)
    assert torch.equal(got, -torch.empty(1, 3, 5).exponential_().log())
    torch.compiler.reset()

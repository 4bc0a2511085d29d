"""What each RSSM op must do on every backend that has it: bodies of tests; ``tests/ops`` has a class for each op."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apv_fast.backend import probe
from apv_fast.ops.op import Op
from tests.support.rssm_cases import CASES, SIZES, Sizes, Tensors, backends_of, make_case, numpy_scan
from tests.support.rssm_errors import LEAVES_NOT, REFERENCE_ERROR, assert_exact, relative_errors, run, taken
from tests.support.yardstick import VARIATION, least, yardsticks

sizes_strategy = st.builds(
    lambda b, t, e, a, extra, d, h, s, c: Sizes(b, t, e, a, a + extra, d, h, s, c),
    *(st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.integers(0, 3), st.integers(0, 3)),
    *(st.integers(2, 9), st.integers(2, 9), st.integers(1, 4), st.integers(0, 5)),
)

# Tests of backends that take float64; and of an op, whatever its cases.
IN_FLOAT64 = {"test_gradcheck", "test_values_without_gradients", "test_definition"}
OF_AN_OP = {"test_opcheck", "test_compiles_without_graph_break"}


class RSSMOp:
    """The tests of all RSSM ops, for each case in ``cases`` and each backend that implements it."""

    cases: ClassVar[tuple[str, ...]] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Tests that take a case and a backend get all pairs; those in ``in_float64`` on backends that take float64."""
        if not {"case", "backend"} <= set(metafunc.fixturenames):
            return
        name = metafunc.function.__name__
        pairs = [(case, backend) for case in self.cases for backend in backends_of(case)]
        if name in IN_FLOAT64:
            pairs = [pair for pair in pairs if torch.float64 in probe(pair[1]).dtypes]
        if name in OF_AN_OP:
            pairs = [pair for pair in pairs if pair[0] != "stacked_concat"]
        metafunc.parametrize(("case", "backend"), pairs)

    @pytest.mark.statistical
    @pytest.mark.interpreted(
        "observe-triton-odd", "observe-triton-gaussian", "imagine-triton-odd", "step-triton-odd",
        "stacked-triton-odd-float32-sample", "stacked_concat-triton-odd-float32-sample",
    )  # fmt: skip
    @pytest.mark.parametrize("sample", [True, False], ids=["sample", "mode"])
    @pytest.mark.parametrize("dtype", REFERENCE_ERROR, ids=lambda dtype: str(dtype)[6:])
    @pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
    def test_values_and_gradients(
        self, case: str, backend: str, sizes: Sizes, dtype: torch.dtype, sample: bool
    ) -> None:
        if dtype not in probe(backend).dtypes:
            pytest.skip(f"{backend} does not take {dtype}")
        if dtype == torch.bfloat16 and not sample and sizes.discrete:
            pytest.skip("rounding decides which class is the mode")
        if probe(backend).isa == "interpreter" and case.startswith("stacked"):
            few = ("odd", "gaussian") if case == "stacked" else ("odd",)
            if sizes not in [SIZES[name] for name in few]:
                pytest.skip("the interpreter is slow: the stack runs at few sizes, the scans that it shares at all")
        assert_exact(case, backend, sizes, dtype, sample, tiny=sizes == SIZES["ones"])

    @pytest.mark.statistical
    def test_any_shape(self, case: str, backend: str) -> None:
        @settings(
            max_examples=3 if probe(backend).isa == "interpreter" else 10, deadline=None, derandomize=not VARIATION
        )
        @given(sizes=sizes_strategy, seed=st.integers(0, 2**31))
        def check(sizes: Sizes, seed: int) -> None:
            assert_exact(case, backend, sizes, taken(backend, torch.float64), True, seed)

        check()

    def test_any_strides(self, case: str, backend: str) -> None:
        """Inputs with gaps and in other orders give what their contiguous copies give."""
        sizes, dtype = SIZES["odd"], taken(backend, torch.float64)
        tensors = make_case(case, sizes, dtype, device=probe(backend).devices[-1])

        def spaced(x: Tensor) -> Tensor:
            wide = x.new_zeros([2 * size for size in x.shape]).mT if x.dim() > 1 else x.new_zeros(2 * len(x))
            view = (wide.mT if x.dim() > 1 else wide)[tuple(slice(None, None, 2) for _ in x.shape)]
            return view.copy_(x)

        strided = {name: spaced(x) for name, x in tensors.items()}
        assert not any(x.is_contiguous() for x in strided.values())
        errors = relative_errors(run(case, strided, sizes, backend), run(case, tensors, sizes, backend))
        assert max(errors.values()) < (1e-12 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps), errors

    @pytest.mark.interpreted
    def test_gradcheck(self, case: str, backend: str) -> None:
        """Against finite differences; Gaussian latents, since those of one-hot samples are zero."""
        if probe(backend).isa == "interpreter" and case.startswith("stacked"):
            pytest.skip(
                "the interpreter is slow: the stack's gradients are compared with the reference's, which are checked"
            )
        sizes = Sizes(2, 2, 2, 1, 2, 2, 3, 1, 0)
        tensors = make_case(case, sizes, torch.float64, device=probe(backend).devices[-1])
        names = [name for name in tensors if not name.endswith(LEAVES_NOT)]

        def function(*leaves: Tensor) -> tuple[Tensor, ...]:
            return tuple(CASES[case][1](tensors | dict(zip(names, leaves, strict=True)), sizes, backend, True).values())

        leaves = [tensors[name].requires_grad_() for name in names]
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)

    def test_opcheck(self, case: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """opcheck of the very arguments that the public function passes on; the next test covers changing sizes."""
        sizes = replace(SIZES["one step"], discrete=0) if case == "imagine" else SIZES["one step"]
        tensors = make_case(case, sizes, taken(backend, torch.float32), device=probe(backend).devices[-1])
        leaves = {n: x.requires_grad_() if x.is_floating_point() else x for n, x in tensors.items()}
        op, call = CASES[case]
        overload = getattr(torch.ops.apv_fast, op).default
        calls: list[tuple[object, ...]] = []
        own = Op.__call__

        def record(self: Op[Any, Any], arguments: Any, backend: str | None) -> object:
            calls.append((*self.signature.flatten(arguments), backend or ""))
            return own(self, arguments, backend)

        with monkeypatch.context() as patch:
            patch.setattr(Op, "__call__", record)
            call(leaves, sizes, backend, True)
        assert len(calls) == (2 if case == "step" else 1)
        utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
        torch.library.opcheck(overload, calls[0], test_utils=utilities)

    @pytest.mark.interpreted("observe")
    def test_compiles_without_graph_break(self, case: str, backend: str) -> None:
        """The same result, also for other sizes, which torch.compile makes symbolic."""
        compiled = torch.compile(CASES[case][1], fullgraph=True, backend="aot_eager")
        for batch in (2, 3):
            sizes = replace(SIZES["one step"], batch=batch, deter=3 + batch)
            tensors = make_case(case, sizes, taken(backend, torch.float32), device=probe(backend).devices[-1])
            expected = CASES[case][1](tensors, sizes, backend, True)
            for key, x in compiled(tensors, sizes, backend, True).items():
                torch.testing.assert_close(x, expected[key], msg=key)
        torch.compiler.reset()

    def test_fake_tensors(self, case: str, backend: str) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        sizes = SIZES["odd"]
        tensors = make_case(case, sizes, torch.bfloat16, device=probe(backend).devices[-1])
        real = CASES[case][1](tensors, sizes, backend, True)
        with FakeTensorMode() as mode:
            fakes: Tensors = {name: mode.from_tensor(x) for name, x in tensors.items()}
            for name, x in CASES[case][1](fakes, sizes, backend, True).items():
                assert (x.shape, x.dtype, x.device) == (real[name].shape, torch.float32, real[name].device), name


class WithoutGradients(RSSMOp):
    """And the tests of those that a backend may compute in another way where nobody asks for gradients."""

    @pytest.mark.statistical
    @pytest.mark.interpreted("odd")
    @pytest.mark.parametrize("sample", [True, False], ids=["sample", "mode"])
    @pytest.mark.parametrize("name", ["odd", "gaussian", "action-free", "wide"])
    def test_values_without_gradients(self, case: str, backend: str, name: str, sample: bool) -> None:
        """An engine may have another way for these; float64, and where sums are long the narrower dtypes too."""
        sizes, call = SIZES[name], CASES[case][1]
        for dtype in REFERENCE_ERROR if name == "wide" and sample else [torch.float64]:
            tensors = make_case(case, sizes, dtype, device=probe(backend).devices[-1])
            exact = {key: x.double() if x.is_floating_point() else x for key, x in tensors.items()}
            with torch.no_grad():
                expected = call(exact, sizes, "reference", sample)
                got = relative_errors(call(tensors, sizes, backend, sample), expected)
                plain = yardsticks(functools.partial(call, tensors, sizes, "reference", sample), backend)
                reference = least(relative_errors(own, expected) for own in plain)
            for key, error in got.items():
                bound = 1e-12 if dtype == torch.float64 else 2 * max(reference[key], torch.finfo(dtype).eps / 2)
                assert error <= bound, f"{key}, {dtype}: {error:.2e}, reference {reference[key]:.2e}"


class Defined(RSSMOp):
    """And the tests of those whose forward pass is written out in NumPy."""

    @pytest.mark.parametrize("sample", [True, False], ids=["sample", "mode"])
    @pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
    def test_definition(self, case: str, backend: str, sizes: Sizes, sample: bool) -> None:
        """The forward pass, written out in NumPy."""
        tensors = make_case(case, sizes, torch.float64, device=probe(backend).devices[-1])
        expected = numpy_scan(tensors, sizes, look=case == "observe", sample=sample)
        errors = relative_errors(CASES[case][1](tensors, sizes, backend, sample), expected)
        assert max(errors.values()) < 1e-12, errors

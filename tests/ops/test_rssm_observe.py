"""The RSSM ops on every backend that implements them: against NumPy, a float64 run, and each other."""

from __future__ import annotations

import functools
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apv_fast import ops
from apv_fast.backend import probe
from apv_fast.nn import RSSM
from apv_fast.ops.op import Op
from tests.support.rssm_cases import (
    CASES,
    SIZES,
    EqualSizes,
    Sizes,
    Tensors,
    backends_of,
    make_case,
    make_problem,
    numpy_scan,
    observe,
    params_of,
    stacked,
    stacked_concat,
    step,
    upper_sizes,
)
from tests.support.yardstick import VARIATION, judge, least, yardsticks

ENGINES = [(case, backend) for case in CASES for backend in backends_of(case)]
EXACT = [(case, backend) for case, backend in ENGINES if torch.float64 in probe(backend).dtypes]
# Largest relative error of the reference itself that is believed, per tensor; backends may have twice its actual error.
REFERENCE_ERROR = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.1}
FEW = 64  # numbers; see measure
LEAVES_NOT = ("is_first", "noise")


def taken(backend: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype, or the widest one that the backend takes instead."""
    dtypes = probe(backend).dtypes
    return dtype if dtype in dtypes else max(dtypes, key=lambda other: other.itemsize)


def run(case: str, tensors: Tensors, sizes: Sizes, backend: str, sample: bool = True) -> Tensors:
    """All outputs of a case, and the gradients of Σ output·cotangent under "grad NAME"."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items() if not name.endswith(LEAVES_NOT)}
    outputs = CASES[case][1](tensors | leaves, sizes, backend, sample)
    generator = torch.Generator().manual_seed(99)
    loss = torch.zeros((), dtype=torch.float64)
    for name in sorted(outputs):
        cotangent = torch.randn(outputs[name].shape, generator=generator, dtype=torch.float64)
        loss = loss + (outputs[name].double().cpu() * cotangent).sum()
    loss.backward()
    gradients = {f"grad {name}": torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()}
    return {name: x.detach() for name, x in outputs.items()} | gradients


def relative_errors(got: Tensors, expected: Tensors) -> dict[str, float]:
    assert got.keys() == expected.keys()
    result = {}
    for name, want in expected.items():
        assert got[name].shape == want.shape, name
        difference, size = torch.dist(got[name].double().cpu(), want.double().cpu()).item(), want.norm().item()
        result[name] = difference / size if size else (0.0 if difference == 0 else float("inf"))
    return result


def compare(
    case: str, backend: str, sizes: Sizes, dtype: torch.dtype, sample: bool, seed: int
) -> tuple[Tensors, dict[str, float], dict[str, float]]:
    """What a float64 run gives, and the relative errors of this backend and of the reference in this dtype."""
    device = probe(backend).devices[-1]
    tensors = make_case(case, sizes, dtype, seed, device)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
    expected = run(case, exact, sizes, "reference", sample)
    plain = yardsticks(lambda: run(case, tensors, sizes, "reference", sample), backend)
    reference = least(relative_errors(own, expected) for own in plain)
    return expected, relative_errors(run(case, tensors, sizes, backend, sample), expected), reference


def measure(
    case: str, backend: str, sizes: Sizes, dtype: torch.dtype, sample: bool, seed: int, tiny: bool = False
) -> dict[str, tuple[float, float]]:
    """Relative errors (this backend's, the reference's in the same dtype) against a float64 run, by tensor.

    Below float64, tensors of a few numbers are taken together: the error of a handful of roundings is luck, of both.
    ``tiny``: so is the bound of the reference's own error; with sizes of 1 some tensors nearly cancel.
    """
    expected, got, reference = compare(case, backend, sizes, dtype, sample, seed)
    for name, error in () if tiny else reference.items():
        assert error <= REFERENCE_ERROR[dtype], f"reference {name}: {error:.2e}"
    errors = {name: (got[name], reference[name]) for name in got}
    if few := [errors.pop(name) for name in got if dtype != torch.float64 and expected[name].numel() < FEW]:
        ours, own = (statistics.fmean(error**2 for error in side) ** 0.5 for side in zip(*few, strict=True))
        errors["tensors of a few numbers"] = ours, own
    for name, (_, error) in () if tiny and len(errors) == 1 else errors.items():
        assert error <= REFERENCE_ERROR[dtype], f"reference {name}: {error:.2e}"
    return errors


def assert_exact(
    case: str, backend: str, sizes: Sizes, dtype: torch.dtype, sample: bool, seed: int = 0, tiny: bool = False
) -> None:
    """Values and gradients, see :func:`tests.support.yardstick.judge`."""
    judge(
        lambda i: measure(case, backend, sizes, dtype, sample, seed + i, tiny),
        dtype,
        exact=backend != "reference",  # the reference has no error against itself
    )


@pytest.mark.statistical
@pytest.mark.interpreted(
    "observe-triton-odd", "observe-triton-gaussian", "imagine-triton-odd", "step-triton-odd",
    "stacked-triton-odd-float32-sample", "stacked_concat-triton-odd-float32-sample",
)  # fmt: skip
@pytest.mark.parametrize("sample", [True, False], ids=["sample", "mode"])
@pytest.mark.parametrize("dtype", REFERENCE_ERROR, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize(("case", "backend"), ENGINES)
def test_values_and_gradients(case: str, backend: str, sizes: Sizes, dtype: torch.dtype, sample: bool) -> None:
    if dtype not in probe(backend).dtypes:
        pytest.skip(f"{backend} does not take {dtype}")
    if dtype == torch.bfloat16 and not sample and sizes.discrete:
        pytest.skip("rounding decides which class is the mode")
    if probe(backend).isa == "interpreter" and case.startswith("stacked"):
        few = ("odd", "gaussian") if case == "stacked" else ("odd",)
        if sizes not in [SIZES[name] for name in few]:
            pytest.skip("the interpreter is slow: the stack runs at few sizes, the scans that it shares at all")
    assert_exact(case, backend, sizes, dtype, sample, tiny=sizes == SIZES["ones"])


@pytest.mark.parametrize(("case", "backend"), [e for e in ENGINES if e[0].startswith("stacked")])
def test_two_equal_models(case: str, backend: str) -> None:
    """As in production, and of sizes that fill their tiles."""
    sizes = EqualSizes(2, 3, 8, 4, 4, 16, 16, 4, 4)
    assert upper_sizes(sizes, False).deter == sizes.deter and upper_sizes(sizes, False).latent == sizes.latent
    assert_exact(case, backend, sizes, taken(backend, torch.float32), True)


@pytest.mark.statistical
@pytest.mark.interpreted("odd")
@pytest.mark.parametrize("sample", [True, False], ids=["sample", "mode"])
@pytest.mark.parametrize("name", ["odd", "gaussian", "action-free", "wide"])
@pytest.mark.parametrize(("case", "backend"), [e for e in EXACT if e[0] in ("imagine", "step")])
def test_values_without_gradients(case: str, backend: str, name: str, sample: bool) -> None:
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


sizes_strategy = st.builds(
    lambda b, t, e, a, extra, d, h, s, c: Sizes(b, t, e, a, a + extra, d, h, s, c),
    *(st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.integers(0, 3), st.integers(0, 3)),
    *(st.integers(2, 9), st.integers(2, 9), st.integers(1, 4), st.integers(0, 5)),
)


@pytest.mark.statistical
@pytest.mark.parametrize(("case", "backend"), ENGINES)
def test_any_shape(case: str, backend: str) -> None:
    @settings(max_examples=3 if probe(backend).isa == "interpreter" else 10, deadline=None, derandomize=not VARIATION)
    @given(sizes=sizes_strategy, seed=st.integers(0, 2**31))
    def check(sizes: Sizes, seed: int) -> None:
        assert_exact(case, backend, sizes, taken(backend, torch.float64), True, seed)

    check()


@pytest.mark.parametrize("sample", [True, False], ids=["sample", "mode"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize(("case", "backend"), [e for e in EXACT if e[0] in ("observe", "imagine")])
def test_definition(case: str, backend: str, sizes: Sizes, sample: bool) -> None:
    """The forward pass, written out in NumPy."""
    tensors = make_case(case, sizes, torch.float64, device=probe(backend).devices[-1])
    expected = numpy_scan(tensors, sizes, look=case == "observe", sample=sample)
    errors = relative_errors(CASES[case][1](tensors, sizes, backend, sample), expected)
    assert max(errors.values()) < 1e-12, errors


@pytest.mark.parametrize(("case", "backend"), ENGINES)
def test_any_strides(case: str, backend: str) -> None:
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


@pytest.mark.parametrize("backend", [backend for case, backend in EXACT if case == "observe"])
def test_is_first_starts_again_from_zeros(backend: str) -> None:
    sizes = SIZES["odd"]
    tensors = make_problem(sizes, torch.float64, device=probe(backend).devices[-1])
    tensors["is_first"] = torch.zeros_like(tensors["is_first"])
    tensors["is_first"][1, 2] = tensors["is_first"][2, 0] = True
    whole = observe(tensors, sizes, backend)
    for row, start in ((1, 2), (2, 0)):
        part = {name: x if name.startswith("params.") else x[row : row + 1] for name, x in tensors.items()}
        for name in ("embed", "action", "is_first", "post_noise", "prior_noise"):
            part[name] = part[name][:, start:].clone()
        part["deter"], part["stoch"] = torch.zeros_like(part["deter"]), torch.zeros_like(part["stoch"])
        part["action"][:, 0] = 0
        part["is_first"][:] = False
        for name, x in observe(part, replace(sizes, batch=1), backend).items():
            torch.testing.assert_close(x[0], whole[name][row, start:], msg=name)


@pytest.mark.parametrize("backend", backends_of("observe"))
def test_no_state_is_zeros(backend: str) -> None:
    sizes = SIZES["odd"]
    tensors = make_problem(sizes, taken(backend, torch.float32), device=probe(backend).devices[-1])
    params, noise = params_of(tensors), (tensors["post_noise"], tensors["prior_noise"])
    inputs = (params, tensors["embed"], tensors["is_first"], tensors["action"])
    initial = ops.initial_state(params, sizes.latent, sizes.batch)
    assert {name: tuple(x.shape) for name, x in initial.items()} == {
        "deter": (3, 9), "stoch": (3, 3, 7), "logit": (3, 3, 7),
    }  # fmt: skip
    assert not any(x.any() for x in initial.values())
    with_state, _ = ops.rssm_observe(*inputs, initial, latent=sizes.latent, noise=noise, backend=backend)
    without, _ = ops.rssm_observe(*inputs, latent=sizes.latent, noise=noise, backend=backend)
    assert torch.equal(with_state["logit"], without["logit"])


def test_one_noise_tensor_serves_both() -> None:
    sizes = SIZES["odd"]
    tensors = make_problem(sizes, torch.float32)
    inputs = (params_of(tensors), tensors["embed"], tensors["is_first"], tensors["action"])
    one, two = tensors["post_noise"], tensors["prior_noise"]
    _, prior = ops.rssm_observe(*inputs, latent=sizes.latent, noise=one)
    _, same = ops.rssm_observe(*inputs, latent=sizes.latent, noise=(one, one))
    _, other = ops.rssm_observe(*inputs, latent=sizes.latent, noise=(one, two))
    assert torch.equal(prior["stoch"], same["stoch"])
    assert not torch.equal(prior["stoch"], other["stoch"])


@pytest.mark.parametrize("discrete", [7, 0], ids=["categorical", "gaussian"])
def test_a_generator_fixes_the_samples(discrete: int) -> None:
    sizes = replace(SIZES["odd"], discrete=discrete)
    tensors = make_problem(sizes, torch.float32)
    inputs = (params_of(tensors), tensors["embed"], tensors["is_first"], tensors["action"])

    def sample(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return ops.rssm_observe(*inputs, latent=sizes.latent, generator=generator)[0]["stoch"]

    torch.manual_seed(0)
    first = sample(1)
    assert torch.equal(first, sample(1))
    assert not torch.equal(first, sample(2))


@pytest.mark.parametrize("backend", backends_of("observe"))
def test_samples_follow_the_distribution(backend: str) -> None:
    """20 000 first steps of one state: the frequency of every class is its probability."""
    sizes = Sizes(1, 1, 2, 0, 1, 3, 4, 2, 5)
    device = probe(backend).devices[-1]
    tensors = make_problem(sizes, taken(backend, torch.float32), device=device)
    embed = tensors["embed"].expand(20_000, 1, 2)
    generator = torch.Generator(device).manual_seed(0)
    is_first = torch.ones(20_000, 1, dtype=torch.bool, device=device)
    states = ops.rssm_observe(
        params_of(tensors), embed, is_first, latent=sizes.latent, generator=generator, backend=backend
    )
    for state in states:
        probability = state["logit"][0, 0].softmax(-1)
        assert (state["stoch"].mean((0, 1)) - probability).abs().max() < 0.015  # four standard deviations


@pytest.mark.parametrize("backend", backends_of("step"))
def test_samples_are_one_hot_with_the_gradient_of_softmax(backend: str) -> None:
    """With respect to obs_dist's bias, which is added to the logits; a mode has no gradient."""
    sizes = SIZES["odd"]
    tensors = make_problem(sizes, torch.float64, device=probe(backend).devices[-1])
    bias = tensors["params.obs_dist_bias"].requires_grad_()
    for sample in (True, False):
        outputs = step(tensors, sizes, backend, sample)
        stoch, logit = outputs["post.stoch"], outputs["post.logit"]
        assert set(stoch.flatten().tolist()) == {0.0, 1.0}
        assert (stoch.sum(-1) == 1).all()
        cotangent = torch.randn(stoch.shape, dtype=torch.float64).to(stoch.device)
        if not sample:
            assert not stoch.requires_grad
            assert torch.equal(stoch.argmax(-1), logit.argmax(-1))
            continue
        (got,) = torch.autograd.grad((stoch * cotangent).sum(), bias, retain_graph=True)
        (expected,) = torch.autograd.grad((logit.softmax(-1) * cotangent).sum(), bias)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("sample", [True, False], ids=["sample", "mode"])
@pytest.mark.parametrize("name", ["odd", "gaussian", "action-free"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_sequences_equal_their_steps(name: str, dtype: torch.dtype, sample: bool) -> None:
    """``observe`` is T ``obs_step``, ``imagine`` is T ``img_step``, in one module; states are float32."""
    sizes = SIZES[name]
    tensors = make_problem(sizes, torch.float32)
    torch.manual_seed(0)
    model = RSSM(
        sizes.embed,
        sizes.action,
        deter=sizes.deter,
        hidden=sizes.hidden,
        stoch=sizes.stoch,
        discrete=sizes.discrete,
        dtype=dtype,
    )
    embed, is_first, action = tensors["embed"], tensors["is_first"], tensors.get("action")
    post_noise, prior_noise = tensors["post_noise"], tensors["prior_noise"]
    posts, priors = model.observe(embed, is_first, action, sample=sample, noise=(post_noise, prior_noise))
    imagined = model.imagine(model.initial(sizes.batch), action, sizes.length, sample=sample, noise=prior_noise)
    state, dream = model.initial(sizes.batch), model.initial(sizes.batch)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for t in range(sizes.length):
        a = None if action is None else action[:, t]
        noise = (post_noise[:, t], prior_noise[:, t])
        state, prior = model.obs_step(state, a, embed[:, t], is_first[:, t], sample=sample, noise=noise)
        dream = model.img_step(dream, a, sample=sample, noise=noise[1])
        for whole, one in ((posts, state), (priors, prior), (imagined, dream)):
            assert whole.keys() == one.keys()
            for key, x in one.items():
                assert x.dtype == torch.float32 == whole[key].dtype
                torch.testing.assert_close(whole[key][:, t], x, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("concat_embed", [False, True])
@pytest.mark.parametrize("backend", [backend for case, backend in EXACT if case == "stacked"])
def test_a_stack_is_two_models(backend: str, concat_embed: bool) -> None:
    sizes = SIZES["odd"]
    case = "stacked_concat" if concat_embed else "stacked"
    tensors = make_case(case, sizes, torch.float64, device=probe(backend).devices[-1])
    both = (stacked_concat if concat_embed else stacked)(tensors, sizes, backend)
    lower = {name.removeprefix("af."): x for name, x in tensors.items() if name.startswith("af.")}
    af = observe(lower | {"embed": tensors["embed"], "is_first": tensors["is_first"]}, replace(sizes, action=0))
    feat = torch.cat([af["post.stoch"].flatten(2), af["post.deter"]], -1)  # stoch first
    feat = torch.cat([tensors["embed"], feat], -1) if concat_embed else feat
    upper = observe(tensors | {"embed": feat}, upper_sizes(sizes, concat_embed))
    expected = {f"af_{name}": x for name, x in af.items()} | upper
    assert max(relative_errors(both, expected).values()) < 1e-12


def test_an_action_free_model_ignores_actions() -> None:
    sizes = SIZES["action-free"]
    tensors = make_problem(sizes, torch.float32)
    model = RSSM(sizes.embed, deter=8, hidden=9, stoch=3, discrete=4)
    actions = torch.randn(2, 4, 3)
    embed, is_first = tensors["embed"], tensors["is_first"]
    with_actions, _ = model.observe(embed, is_first, actions, noise=tensors["post_noise"])
    without, _ = model.observe(embed, is_first, noise=tensors["post_noise"])
    assert torch.equal(with_actions["logit"], without["logit"])
    assert model.imagine(model.initial(2), actions, sample=False)["deter"].shape == (2, 4, 8)


@pytest.mark.interpreted
@pytest.mark.parametrize(("case", "backend"), EXACT)
def test_gradcheck(case: str, backend: str) -> None:
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


@pytest.mark.parametrize(("case", "backend"), [e for e in ENGINES if e[0] != "stacked_concat"])
def test_opcheck(case: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """opcheck of the very arguments that the public function passes on; the next test covers changing sizes."""
    sizes = replace(SIZES["one step"], discrete=0) if case == "imagine" else SIZES["one step"]
    tensors = make_case(case, sizes, taken(backend, torch.float32), device=probe(backend).devices[-1])
    leaves = {n: x.requires_grad_() if x.is_floating_point() else x for n, x in tensors.items()}
    op, call = CASES[case]
    overload = getattr(torch.ops.apv_fast, op).default
    calls: list[tuple[object, ...]] = []
    run = Op.__call__

    def record(self: Op[Any, Any], own: Any, backend: str | None) -> object:
        calls.append((*self.signature.flatten(own), backend or ""))
        return run(self, own, backend)

    with monkeypatch.context() as patch:
        patch.setattr(Op, "__call__", record)
        call(leaves, sizes, backend, True)
    assert len(calls) == (2 if case == "step" else 1)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(overload, calls[0], test_utils=utilities)


@pytest.mark.interpreted("observe")
@pytest.mark.parametrize(("case", "backend"), [e for e in ENGINES if e[0] != "stacked_concat"])
def test_compiles_without_graph_break(case: str, backend: str) -> None:
    """The same result, also for other sizes, which torch.compile makes symbolic."""
    compiled = torch.compile(CASES[case][1], fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        sizes = replace(SIZES["one step"], batch=batch, deter=3 + batch)
        tensors = make_case(case, sizes, taken(backend, torch.float32), device=probe(backend).devices[-1])
        expected = CASES[case][1](tensors, sizes, backend, True)
        for key, x in compiled(tensors, sizes, backend, True).items():
            torch.testing.assert_close(x, expected[key], msg=key)
    torch.compiler.reset()


@pytest.mark.parametrize(("case", "backend"), ENGINES)
def test_fake_tensors(case: str, backend: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    sizes = SIZES["odd"]
    tensors = make_case(case, sizes, torch.bfloat16, device=probe(backend).devices[-1])
    real = CASES[case][1](tensors, sizes, backend, True)
    with FakeTensorMode() as mode:
        fakes: Tensors = {name: mode.from_tensor(x) for name, x in tensors.items()}
        for name, x in CASES[case][1](fakes, sizes, backend, True).items():
            assert (x.shape, x.dtype, x.device) == (real[name].shape, torch.float32, real[name].device), name

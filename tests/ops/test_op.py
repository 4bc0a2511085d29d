"""What all ops have in common: schemas made of calls, autograd around kernels, transforms of torch.func."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from apv_fast import ops
from apv_fast.backend import BackendError, probe
from apv_fast.ops.op import OPS, Gradients, Kernel, Signature, _unobserved
from apv_fast.types import ActorParams, Latent, NoisePair, RSSMParams, State

needs_cpu = pytest.mark.skipif(not probe("cpu").available, reason=f"cpu: {probe('cpu').reason}")


class Everything(NamedTuple):
    """A field of every kind."""

    x: Tensor
    maybe: Tensor | None
    several: list[Tensor]
    params: RSSMParams
    actor: ActorParams
    state: State
    noise: NoisePair
    latent: Latent
    number: int
    share: float
    on: bool
    name: str
    dtype: torch.dtype


def everything() -> Everything:
    """Numbers that tell each tensor apart."""
    numbers = iter(range(100))

    def t() -> Tensor:
        return torch.tensor(float(next(numbers)))

    return Everything(
        t(),
        None,
        [t(), t()],
        RSSMParams(*(t() for _ in RSSMParams._fields)),
        ActorParams((t(), t()), t(), t(), t(), t()),
        {"deter": t(), "stoch": t()},
        (t(), None),
        Latent(3, 4, 0.5),
        7,
        0.25,
        True,
        "mean",
        torch.bfloat16,
    )


def test_a_call_comes_back_from_its_arguments() -> None:
    signature, call = Signature(Everything), everything()
    assert signature.schema == (
        "Tensor x, Tensor? maybe, Tensor[] several, Tensor[] params, Tensor[] actor, bool actor_discrete, "
        "Tensor state_deter, Tensor state_stoch, Tensor? noise_post, Tensor? noise_prior, int latent_stoch, "
        "int latent_discrete, float latent_min_std, int number, float share, bool on, str name, ScalarType dtype"
    )
    values = signature.flatten(call)
    assert len(values) == len(signature.names) == signature.schema.count(",") + 1
    assert str(signature.restore(values)) == str(call)
    slots = signature.slots(values)
    assert [None if x is None else x.item() for x in slots] == [0.0, None, *(float(i) for i in range(1, 26)), None]


def test_a_field_that_no_schema_has() -> None:
    class Call(NamedTuple):
        x: set[Tensor]

    Call.__annotations__["x"] = set[Tensor]
    with pytest.raises(TypeError, match="field x is of set"):
        Signature(Call)


class Pair(NamedTuple):
    """Two numbers."""

    a: Tensor
    b: Tensor | None
    several: list[Tensor]


def _forward(call: Pair, keep: bool) -> list[Tensor]:
    total = call.a + sum(call.several)
    return [total, total.round(), call.a.clone()] if keep else [total, total.round()]


def _backward(call: Pair, results: list[Tensor], grads: list[Tensor | None], needs: frozenset[str]) -> Gradients:
    grad = grads[0]
    assert grad is not None
    return {"a": grad * results[2], "b": torch.zeros(2), "several": [grad for _ in call.several]}


KERNEL = Kernel(
    "test_op_pair",
    Pair,
    outputs=2,
    forward=_forward,
    fake=_forward,
    backward=_backward,
    constant=lambda _: [1],
)


def pair() -> tuple[Tensor, Tensor, Tensor]:
    """Leaves."""
    a, b, c = (torch.tensor([x, 2.0], requires_grad=True) for x in (3.0, 4.0, 5.0))
    return a, b, c


def test_a_kernel_is_differentiable() -> None:
    """By what its backward pass says; a constant output has no gradient."""
    a, b, c = pair()
    total, rounded = KERNEL(a, b.detach(), [c, c.detach()])
    assert total.requires_grad and not rounded.requires_grad
    of_a, of_c = torch.autograd.grad(total.sum(), (a, c))
    assert torch.equal(of_a, a) and torch.equal(of_c, torch.ones(2))


def test_a_gradient_that_a_backend_lacks_is_an_error() -> None:
    """Not a zero that nobody notices."""
    a, b, c = pair()
    kernel = Kernel("test_op_lack", Pair, outputs=1, forward=_forward, fake=_forward, backward=lambda *_: {"a": a})
    (total,) = kernel(a, b, [c])
    with pytest.raises(NotImplementedError, match=r"test_op_lack.* has no gradient for b, several: detach it"):
        torch.autograd.grad(total.sum(), (a, b))


def test_a_kernel_without_gradients_keeps_nothing() -> None:
    a, b, c = pair()
    with torch.no_grad():
        assert not any(x.requires_grad for x in KERNEL(a, b, [c]))
    assert not any(x.requires_grad for x in KERNEL(a.detach(), None, [c.detach()]))
    assert len(torch.ops.apv_fast.test_op_pair(a, b, [c], False)) == 2


def test_only_what_is_needed_is_asked_for() -> None:
    asked = []

    def backward(call: Pair, results: list[Tensor], grads: list[Tensor | None], needs: frozenset[str]) -> Gradients:
        asked.append(needs)
        return {"a": grads[0], "b": torch.zeros(2), "several": [grads[0] for _ in call.several]}

    kernel = Kernel("test_op_needs", Pair, outputs=1, forward=_forward, fake=_forward, backward=backward)
    a, b, c = pair()
    (total,) = kernel(a, b.detach(), [c.detach()])
    torch.autograd.grad(total.sum(), a)
    (total,) = kernel(a, b, [c])
    torch.autograd.grad(total.sum(), (a, c))
    assert asked == [{"a"}, {"a", "b", "several"}]


class Counter(TorchDispatchMode):
    """Ops by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_who_watches_sees_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody does as a rule, and it is called without the dispatcher."""
    a, b, c = pair()
    assert _unobserved([a, torch.nn.Parameter(b), c.detach(), None])
    with monkeypatch.context() as without:
        without.setattr(KERNEL, "op", None)
        without.setattr(KERNEL, "backward_op", None)
        torch.autograd.grad(KERNEL(a, b.detach(), [c])[0].sum(), a)
    with Counter() as counter:
        total, _ = KERNEL(a, b.detach(), [c])
        torch.autograd.grad(total.sum(), a)
    names = ["apv_fast.test_op_pair.default", "apv_fast.test_op_pair_backward.default"]
    assert [name for name in counter.seen if "test_op" in name] == names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        KERNEL(a.detach(), None, [])
    assert "apv_fast::test_op_pair" in {event.name for event in profiler.events()}
    both: Any = KERNEL(TwoTensor(torch.ones(2), torch.zeros(2)), None, [])[0]  # a subclass, which runs each op on both
    assert torch.equal(both.a, torch.ones(2)) and torch.equal(both.b, torch.zeros(2))
    traced = make_fx(lambda x: KERNEL(x, None, [x])[0])(torch.ones(2))
    assert "test_op_pair" in traced.code


def test_gradients_by_vmap() -> None:
    """A batch of gradients for one way back, which PyTorch takes apart; not the numbers behind a wrapper."""
    a, b, c = pair()
    total, _ = KERNEL(a, b.detach(), [c.detach()])
    (rows,) = torch.autograd.grad(total, a, torch.eye(2), is_grads_batched=True)
    assert torch.equal(rows, torch.diag(a))


def test_negated_views_are_resolved() -> None:
    """Of a conjugate's imaginary part only a flag says that its numbers are negative."""
    x = torch.tensor([1 + 2j, 3 - 4j]).conj().imag
    assert x.is_neg() and not _unobserved([x])
    assert torch.equal(KERNEL(x, None, [])[0], torch.tensor([-2.0, 4.0]))


def test_a_second_derivative_is_an_error() -> None:
    a, b, c = pair()
    total, _ = KERNEL(a, b.detach(), [c])
    (grad,) = torch.autograd.grad(total.square().sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match=r"test_op_pair.* can be differentiated once"):
        torch.autograd.grad(grad.sum(), a)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.apv_fast.test_op_pair.default, (*pair()[:2], [pair()[2]], True))


def returns(backend: str | None = None) -> tuple[Tensor, ...]:
    """Arguments of the λ-return."""
    generator = torch.Generator().manual_seed(0)
    reward, value, discount = (torch.rand(3, 4, generator=generator) for _ in range(3))
    return reward, value, discount, torch.rand(4, generator=generator)


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, x])),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
}


@needs_cpu
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_run_on_the_reference(name: str) -> None:
    """Whose PyTorch they know; a backend that is named is no other one."""
    reward, *rest = returns()

    def run(backend: str | None) -> Tensor:
        result: Tensor = TRANSFORMS[name](lambda x: ops.lambda_return(x, *rest, backend=backend), reward)
        return result

    expected = run("reference")
    assert expected.any() and torch.equal(run(None), expected)
    with pytest.raises(BackendError, match=r"backend 'cpu' cannot run lambda_return: .* torch\.func's transforms"):
        run("cpu")


@needs_cpu
def test_forward_mode_runs_on_the_reference() -> None:
    reward, *rest = returns()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(reward, torch.ones_like(reward))
        tangents = [
            forward_ad.unpack_dual(ops.lambda_return(dual, *rest, backend=b)).tangent for b in ("reference", None)
        ]
        with pytest.raises(BackendError, match="forward-mode"):
            ops.lambda_return(dual, *rest, backend="cpu")
    assert tangents[0].any() and torch.equal(*tangents)


def test_every_op_is_registered() -> None:
    assert all(hasattr(torch.ops.apv_fast, name) for name in OPS)
    assert {"rssm_observe", "kl_balance", "mlp", "knn_bonus"} <= set(OPS)

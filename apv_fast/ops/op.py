"""What all ops have in common: each is registered with ``torch.library`` here, once.

A *call* is a named tuple of an op's checked arguments. From its annotations follow the schema and what has gradients.

:class:`Op` is what the public functions call. It looks the backend up in the table and calls that backend's function
with the fields of the call. A tracer sees one *composite* op, ``apv_fast::NAME``, which does the same: so the
reference, plain PyTorch, is traced through and keeps PyTorch's autograd.

:class:`Kernel` makes a backend's function one *opaque* op, ``apv_fast::NAME_BACKEND``, for autograd and tracers. The
backend gives a forward pass and a backward pass, and says what the first leaves for tensors without numbers.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

from apv_fast.backend import resolve
from apv_fast.profile import annotated
from apv_fast.types import ActorParams, Latent, NoisePair, RSSMParams, State

OPS: dict[str, Op[Any, Any]] = {}  # by name
C = TypeVar("C", bound=tuple[Any, ...])
R = TypeVar("R")
Gradients = dict[str, Any]  # by the name of an argument of the schema: a tensor, or a list of them

_LIBRARY = torch.library.Library("apv_fast", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_PLAIN: dict[Any, str] = {
    **{Tensor: "Tensor", Tensor | None: "Tensor?", list[Tensor]: "Tensor[]"},
    **{int: "int", float: "float", bool: "bool", str: "str", torch.dtype: "ScalarType"},
}
_BELOW_AUTOGRAD = torch._C._after_autograd_keyset
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


class _Field(NamedTuple):
    """One field of a call among the arguments of a schema."""

    arguments: tuple[str, ...]  # "Tensor reward"
    pack: Callable[[Any], Sequence[Any]]
    unpack: Callable[..., Any]


def _field(name: str, kind: Any) -> _Field:
    if kind in _PLAIN:
        return _Field((f"{_PLAIN[kind]} {name}",), lambda x: (x,), lambda x: x)
    if kind is RSSMParams:
        return _Field((f"Tensor[] {name}",), lambda x: (list(x),), lambda x: RSSMParams(*x))
    if kind is ActorParams:
        arguments = (f"Tensor[] {name}", f"bool {name}_discrete")
        return _Field(arguments, lambda x: (x.flat(), x.discrete), ActorParams.of)
    if kind is Latent:
        return _Field((f"int {name}_stoch", f"int {name}_discrete", f"float {name}_min_std"), tuple, Latent)
    if kind == State:
        arguments = (f"Tensor {name}_deter", f"Tensor {name}_stoch")
        return _Field(arguments, lambda x: (x["deter"], x["stoch"]), lambda d, s: {"deter": d, "stoch": s})
    if kind == NoisePair:
        return _Field((f"Tensor? {name}_post", f"Tensor? {name}_prior"), tuple, lambda *x: x)
    raise TypeError(f"field {name} is of {kind}, which no schema has")


class Signature(Generic[C]):
    """The arguments of a schema that the fields of a call make."""

    def __init__(self, call: type[C]) -> None:
        hints = get_type_hints(call)
        self.call = call
        self.fields = [_field(name, hints[name]) for name in call._fields]  # type: ignore[attr-defined]
        arguments = [argument for field in self.fields for argument in field.arguments]
        self.schema = ", ".join(arguments)
        kinds, self.names = ([part[i] for part in map(str.split, arguments)] for i in (0, 1))
        # Where tensors are among the arguments, and where lists of them.
        self.tensors = [(i, kind == "Tensor[]") for i, kind in enumerate(kinds) if kind.startswith("Tensor")]
        ends = list(itertools.accumulate(len(field.arguments) for field in self.fields))
        self._places = [
            (field.unpack, begin, end) for field, begin, end in zip(self.fields, [0, *ends], ends, strict=False)
        ]
        self._plain = all(len(field.arguments) == 1 and kind in _PLAIN for field, kind in self._pairs(hints))

    def _pairs(self, hints: dict[str, Any]) -> Iterator[tuple[_Field, Any]]:
        return zip(self.fields, hints.values(), strict=True)

    def flatten(self, call: C) -> Sequence[Any]:
        """The arguments."""
        if self._plain:
            return call
        return [value for field, x in zip(self.fields, call, strict=True) for value in field.pack(x)]

    def slots(self, values: Sequence[Any]) -> list[Tensor | None]:
        """All tensors among the arguments in a row; None where an optional one is absent."""
        slots: list[Tensor | None] = []
        for i, listed in self.tensors:
            if listed:
                slots += values[i]
            else:
                slots.append(values[i])
        return slots

    def restore(self, values: Sequence[Any]) -> C:
        """The call."""
        if self._plain:
            return self.call(*values)
        return self.call(*[unpack(*values[begin:end]) for unpack, begin, end in self._places])


class Op(Generic[C, R]):
    """An op by its name in the table of backends.

    Args:
        name: its row.
        call: the named tuple.
        decides: the tensor whose device and dtype choose the backend.
        sizes: what :data:`apv_fast.backend.OBSTACLES` of the op ask for.
        returns: what the schema says.
        pack, unpack: the result as what the schema says, and back.
    """

    def __init__(
        self,
        name: str,
        call: type[C],
        *,
        decides: Callable[[C], Tensor],
        sizes: Callable[[C], dict[str, int]] = lambda _: {},
        returns: str = "Tensor",
        pack: Callable[[C, R], Any] = lambda _, result: result,
        unpack: Callable[[C, Any], R] = lambda _, values: values,
    ) -> None:
        self.name, self.signature = name, Signature(call)
        self._decides, self._sizes, self._pack, self._unpack = decides, sizes, pack, unpack
        self._run = annotated(name)(self._choose_and_run)
        _LIBRARY.define(f"{name}({self.signature.schema}, str backend) -> {returns}", tags=_TAGS)
        _LIBRARY.impl(name, self._composite, "CompositeImplicitAutograd")
        self._traced = getattr(torch.ops.apv_fast, name)
        OPS[name] = self

    def __call__(self, call: C, backend: str | None) -> R:
        """What the backend's function makes of the fields."""
        if torch.compiler.is_compiling():
            return self._unpack(call, self._traced(*self.signature.flatten(call), backend or ""))
        return self._run(call, backend)

    def _choose_and_run(self, call: C, backend: str | None) -> R:
        result: R = resolve(self.name, self._decides(call), backend, **self._sizes(call))(*call)
        return result

    def _composite(self, *values: Any) -> Any:
        *rest, backend = values
        call = self.signature.restore(rest)
        return self._pack(call, self._run(call, backend))


class Kernel(Generic[C]):
    """A backend's way through an op and back as one opaque op; of the fields of ``call`` it makes the outputs.

    Arguments have been checked; nothing in it may stop the device. Where nobody but autograd looks, the passes run
    without PyTorch's dispatcher, which takes longer than a small op: see :func:`_unobserved`.

    Args:
        name: of the op, ``OP_BACKEND``.
        call: the named tuple.
        outputs: how many tensors the caller sees.
        forward: the outputs and, with ``keep``, behind them what the backward pass needs besides.
        fake: empty tensors like those of ``forward``, for tensors without numbers.
        backward: gradients of the arguments that are named in its last argument, from the call, what ``forward`` gave
            and the gradients of the outputs. One that is missing is an error, but noise has none. None: no output has
            a gradient.
        constant: outputs that have no gradient after all, such as modes of one-hots.
        ready: gradients that need no computing for these results and gradients of outputs, or None.
        like: an empty tensor for the gradient of an argument.
    """

    def __init__(
        self,
        name: str,
        call: type[C],
        *,
        outputs: int,
        forward: Callable[[C, bool], list[Tensor]],
        fake: Callable[[C, bool], list[Tensor]],
        backward: Callable[[C, list[Tensor], list[Tensor | None], frozenset[str]], Gradients] | None = None,
        constant: Callable[[C], Sequence[int]] | None = None,
        ready: Callable[[list[Tensor], list[Tensor | None]], Gradients | None] = lambda *_: None,
        like: Callable[[Tensor], Tensor] = lambda x: x.new_empty(x.shape),
    ) -> None:
        self.signature, self.outputs, self.constant, self.ready = Signature(call), outputs, constant, ready
        self._forward_pass, self._backward_pass, self._fake, self._like = forward, backward, fake, like
        self.forward, self.backward = _untraced(self._forward), _untraced(self._backward)
        schema = self.signature.schema
        self.op = self._register(name, f"{schema}, bool keep", self.forward, self._fake_forward)
        _LIBRARY.impl(name, self._autograd, "Autograd", with_keyset=True)
        if backward is not None:
            schema = f"{schema}, Tensor[] results, Tensor?[] grads, bool[] needs"
            self.backward_op = self._register(f"{name}_backward", schema, self.backward, self._fake_backward)
            _LIBRARY.impl(f"{name}_backward", self._autograd_of_backward, "Autograd", with_keyset=True)

    @staticmethod
    def _register(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
        _LIBRARY.define(f"{name}({schema}) -> Tensor[]", tags=_TAGS)
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"apv_fast::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.apv_fast, name).default

    def __call__(self, *fields: Any) -> list[Tensor]:
        """The outputs."""
        values = self.signature.flatten(self.signature.call(*fields))
        keep = self._backward_pass is not None and wants_gradients(*values)
        slots = self.signature.slots(values)
        results: Sequence[Tensor]
        if not _unobserved(slots):
            results = self.op(*values, keep)
        elif keep:
            results = _Differentiable.apply(self, None, (*values, keep), *slots)  # type: ignore[no-untyped-call]
        else:
            with torch.no_grad():
                results = self.forward(*values, keep)
        return list(results[: self.outputs])

    def _forward(self, *values: Any) -> list[Tensor]:
        *rest, keep = values
        return self._forward_pass(self.signature.restore(rest), keep)

    def _fake_forward(self, *values: Any) -> list[Tensor]:
        *rest, keep = values
        return self._fake(self.signature.restore(rest), keep)

    def _backward(self, *values: Any) -> list[Tensor]:
        *rest, results, grads, needs = values
        names = [name for name, need in zip(self.signature.names, needs, strict=True) if need]
        assert self._backward_pass is not None
        out = self._backward_pass(self.signature.restore(rest), results, grads, frozenset(names))
        if missing := [name for name in names if name not in out]:
            raise NotImplementedError(
                f"{self.op} has no gradient for {', '.join(missing)}: detach it, or use backend='reference'"
            )
        return [x for name in names for x in _listed(out[name])]

    def _fake_backward(self, *values: Any) -> list[Tensor]:
        *rest, _, _, needs = values
        return [self._like(x) for value, need in zip(rest, needs, strict=True) if need for x in _listed(value)]

    def _autograd(self, keyset: Any, *values: Any) -> Any:
        if values[-1] and wants_gradients(*values):
            slots = self.signature.slots(values)
            return list(_Differentiable.apply(self, keyset, values, *slots))  # type: ignore[no-untyped-call]
        with torch._C._AutoDispatchBelowAutograd():
            return self.op.redispatch(keyset & _BELOW_AUTOGRAD, *values)

    def _autograd_of_backward(self, keyset: Any, *values: Any) -> Any:
        if wants_gradients(*values):  # with create_graph
            slots = [x for value in values for x in (value if isinstance(value, list) else [value])]
            return list(_Once.apply(self, keyset, values, *slots))  # type: ignore[no-untyped-call]
        with torch._C._AutoDispatchBelowAutograd():
            return self.backward_op.redispatch(keyset & _BELOW_AUTOGRAD, *values)


def _untraced(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, into whose frames torch.compile does not look; free where nothing has been compiled."""
    hidden = torch._disable_dynamo(lambda *values: run(*values))  # type: ignore[attr-defined]
    return lambda *values: (hidden if "torch._dynamo" in sys.modules else run)(*values)


def _unobserved(tensors: Sequence[Tensor | None]) -> bool:
    """Whether these are plain tensors, and nothing but autograd would see an op called through PyTorch's dispatcher.

    What would: modes (fake tensors, tracers, counters), torch.func, torch.jit.trace, the profiler.
    """
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    return all(x is None or (type(x) in _PLAIN_TENSORS and not x.is_neg()) for x in tensors)


def wants_gradients(*arguments: Any) -> bool:
    """Whether anything will ask for the way back from the tensors among these arguments."""
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)


def _listed(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else list(x)


class _Differentiable(torch.autograd.Function):
    """A kernel for autograd; behind the arguments of its op, all tensors among them once more, in a row.

    ``keyset`` is the dispatcher's, or None without it.
    """

    @staticmethod
    def forward(ctx: Any, kernel: Kernel[Any], keyset: Any, values: Sequence[Any], *slots: Tensor | None) -> Any:
        if keyset is None:
            results = kernel.forward(*values)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                results = kernel.op.redispatch(keyset & _BELOW_AUTOGRAD, *values)
        signature, plain = kernel.signature, list(values[:-1])
        for i, listed in signature.tensors:
            plain[i] = len(plain[i]) if listed else None
        constant = results[kernel.outputs :]
        if kernel.constant is not None:
            constant += [results[i] for i in kernel.constant(signature.restore(values[:-1]))]
        ctx.set_materialize_grads(False)
        ctx.kernel, ctx.plain = kernel, plain
        ctx.mark_non_differentiable(*constant)
        ctx.save_for_backward(*slots, *results)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        kernel, saved, needed = ctx.kernel, ctx.saved_tensors, ctx.needs_input_grad[3:]
        grad_out, results = list(grads[: kernel.outputs]), list(saved[len(needed) :])
        if all(grad is None for grad in grad_out):
            return (None,) * (3 + len(needed))
        values, needs, end = list(ctx.plain), [False] * len(ctx.plain), 0
        for i, listed in kernel.signature.tensors:
            begin, end = end, end + (values[i] if listed else 1)
            values[i] = list(saved[begin:end]) if listed else saved[begin]
            needs[i] = any(needed[begin:end]) and "noise" not in kernel.signature.names[i]  # which has no gradient
        ready = kernel.ready(results, grad_out)
        direct = _unobserved([*saved, *grad_out]) and not torch.is_grad_enabled()
        run = kernel.backward if direct else kernel.backward_op
        flat = iter(run(*values, results, grad_out, needs) if ready is None else ())
        out: list[Tensor | None] = [None, None, None]
        for i, listed in kernel.signature.tensors:
            count = len(values[i]) if listed else 1
            if not needs[i]:
                out += [None] * count
            else:
                out += (
                    [next(flat) for _ in range(count)] if ready is None else _listed(ready[kernel.signature.names[i]])
                )
        return tuple(out)


class _Once(torch.autograd.Function):
    """A kernel's backward op, which cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel[Any], keyset: Any, values: Sequence[Any], *slots: Any) -> Any:
        ctx.kernel = kernel
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(kernel.backward_op.redispatch(keyset & _BELOW_AUTOGRAD, *values))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(
            f"{ctx.kernel.op} can be differentiated once; backend='reference' can be differentiated again and again"
        )

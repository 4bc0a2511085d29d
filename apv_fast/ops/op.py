"""What all ops have in common: each is registered with ``torch.library`` here, once.

A *call* is a named tuple of an op's checked arguments. From its annotations follow the schema and what has gradients.

:class:`Op` is what the public functions call. It looks the backend up in the table and calls that backend's function
with the fields of the call. A tracer sees one *composite* op, ``apv_fast::NAME``, which does the same: so the
reference, plain PyTorch, is traced through and keeps PyTorch's autograd.

:class:`Kernel` makes a backend's function one *opaque* op, ``apv_fast::NAME_BACKEND``, for autograd and tracers. The
backend gives a forward pass and a backward pass, and says what the first leaves for tensors without numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
        self.kinds, self.names = ([part[i] for part in map(str.split, arguments)] for i in (0, 1))
        self._plain = all(len(field.arguments) == 1 and kind in _PLAIN for field, kind in self._pairs(hints))

    def _pairs(self, hints: dict[str, Any]) -> Iterator[tuple[_Field, Any]]:
        return zip(self.fields, hints.values(), strict=True)

    def flatten(self, call: C) -> Sequence[Any]:
        """The arguments."""
        if self._plain:
            return call
        return [value for field, x in zip(self.fields, call, strict=True) for value in field.pack(x)]

    def restore(self, values: Sequence[Any]) -> C:
        """The call."""
        if self._plain:
            return self.call(*values)
        rest = iter(values)
        return self.call(*(field.unpack(*(next(rest) for _ in field.arguments)) for field in self.fields))


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

    Arguments have been checked; nothing in it may stop the device.

    Args:
        name: of the op, ``OP_BACKEND``.
        call: the named tuple.
        outputs: how many tensors the caller sees.
        forward: the outputs and, with ``keep``, behind them what the backward pass needs besides.
        fake: empty tensors like those of ``forward``, for tensors without numbers.
        backward: gradients of the arguments that are named in its last argument, from the call, what ``forward`` gave
            and the gradients of the outputs; those that are missing are zeros. None: no output has a gradient.
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
        constant: Callable[[C], Sequence[int]] = lambda _: (),
        ready: Callable[[list[Tensor], list[Tensor | None]], Gradients | None] = lambda *_: None,
        like: Callable[[Tensor], Tensor] = lambda x: x.new_empty(x.shape),
    ) -> None:
        self.signature, self.outputs, self.constant, self.ready = Signature(call), outputs, constant, ready
        self._forward_pass, self._backward_pass, self._fake, self._like = forward, backward, fake, like
        schema = self.signature.schema
        self.op = self._register(name, f"{schema}, bool keep", self._forward, self._fake_forward)
        _LIBRARY.impl(name, self._autograd, "Autograd", with_keyset=True)
        if backward is not None:
            schema = f"{schema}, Tensor[] results, Tensor?[] grads, bool[] needs"
            self.backward_op = self._register(f"{name}_backward", schema, self._backward, self._fake_backward)

    @staticmethod
    def _register(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
        _LIBRARY.define(f"{name}({schema}) -> Tensor[]", tags=_TAGS)
        # As torch.library.custom_op does: a compiled caller's frames are no reason to look into the kernel.
        opaque = torch._disable_dynamo(lambda *values: run(*values))  # type: ignore[attr-defined]
        _LIBRARY.impl(name, opaque, "CompositeExplicitAutograd")
        torch.library.register_fake(f"apv_fast::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.apv_fast, name).default

    def __call__(self, *fields: Any) -> list[Tensor]:
        """The outputs."""
        values = self.signature.flatten(self.signature.call(*fields))
        keep = self._backward_pass is not None and wants_gradients(*_tensors(values))
        results: list[Tensor] = self.op(*values, keep)
        return results[: self.outputs]

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
        made = self._backward_pass(self.signature.restore(rest), results, grads, frozenset(names))
        return [x for name in names for x in (_listed(made[name]) if name in made else self._zeros(rest, name))]

    def _zeros(self, values: Sequence[Any], name: str) -> list[Tensor]:
        return [self._like(x).zero_() for x in _listed(values[self.signature.names.index(name)])]

    def _fake_backward(self, *values: Any) -> list[Tensor]:
        *rest, _, _, needs = values
        return [self._like(x) for value, need in zip(rest, needs, strict=True) if need for x in _listed(value)]

    def _autograd(self, keyset: Any, *values: Any) -> Any:
        *rest, keep = values
        if keep and wants_gradients(*_tensors(rest)):
            tensors = [x for value, kind in zip(rest, self.signature.kinds, strict=True) for x in _slots(value, kind)]
            return list(_Differentiable.apply(self, keyset, rest, *tensors))  # type: ignore[no-untyped-call]
        with torch._C._AutoDispatchBelowAutograd():
            return self.op.redispatch(keyset & _BELOW_AUTOGRAD, *values)


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether anything will ask for the way back from these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _listed(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else list(x)


def _slots(value: Any, kind: str) -> Sequence[Tensor | None]:
    """The tensors of an argument; None where an optional one is absent."""
    if kind == "Tensor[]":
        return list(value)
    return [value] if kind.startswith("Tensor") else []


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from value


class _Differentiable(torch.autograd.Function):
    """A kernel for autograd: all tensors of the call in a row, behind what is none of them."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel[Any], keyset: Any, values: list[Any], *tensors: Tensor | None) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            results = kernel.op.redispatch(keyset & _BELOW_AUTOGRAD, *values, True)
        signature = kernel.signature
        ctx.set_materialize_grads(False)
        ctx.kernel = kernel
        # What is no tensor, and how many there are in a list; None stands for one.
        ctx.plain = [
            (len(value) if kind == "Tensor[]" else None) if kind.startswith("Tensor") else (value,)
            for value, kind in zip(values, signature.kinds, strict=True)
        ]
        constant = {*kernel.constant(signature.restore(values)), *range(kernel.outputs, len(results))}
        ctx.mark_non_differentiable(*(results[i] for i in sorted(constant)))
        ctx.save_for_backward(*tensors, *results)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        kernel, saved, needed = ctx.kernel, iter(ctx.saved_tensors), iter(ctx.needs_input_grad[3:])
        values: list[Any] = []
        wanted: list[list[bool]] = []  # of every argument's tensors
        for plain in ctx.plain:
            if isinstance(plain, tuple):
                values.append(plain[0])
                wanted.append([])
                continue
            tensors = [next(saved) for _ in range(1 if plain is None else plain)]
            values.append(tensors[0] if plain is None else tensors)
            wanted.append([next(needed) for _ in tensors])
        made = _gradients(kernel, values, list(saved), list(grads[: kernel.outputs]), [any(own) for own in wanted])
        out: list[Tensor | None] = []
        for own, of in zip(wanted, made, strict=True):
            out += [x if want else None for want, x in zip(own, of, strict=True)] if of else [None] * len(own)
        return None, None, None, *out


def _gradients(
    kernel: Kernel[Any], values: list[Any], results: list[Tensor], grads: list[Tensor | None], needs: list[bool]
) -> list[list[Tensor]]:
    """Of every argument's tensors; empty where they are not needed or zero."""
    if all(grad is None for grad in grads):
        return [[] for _ in needs]
    names = kernel.signature.names
    if (ready := kernel.ready(results, grads)) is not None:
        return [_listed(ready[name]) if need else [] for name, need in zip(names, needs, strict=True)]
    made = iter(kernel.backward_op(*values, results, grads, needs))
    return [[next(made) for _ in _listed(x)] if need else [] for x, need in zip(values, needs, strict=True)]

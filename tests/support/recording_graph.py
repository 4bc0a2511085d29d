"""A CUDA graph on the CPU: records the operations of a function and repeats them on the same memory.

A CUDA graph repeats kernels with the addresses, shapes and constants that they had when it was recorded, and runs no
Python. :class:`RecordingGraph` does the same with torch's operations: every operation that reaches the dispatcher is
kept with its arguments; a replay runs it again and copies what it gives into the tensors that it gave when it was
recorded. So whatever a CUDA graph would freeze (a Python counter, a rate, a shape that depends on data, a tensor that
was replaced) is frozen here too, and the result differs from running the function again. Random operations draw anew.

What would stop a capture is an error at once (:class:`CaptureError`): reading a value on the host, shapes that depend
on data, copying a Python value to the device.

Launches of Triton kernels in its interpreter are operations too, inside of a custom op or not.

Limits: it does not see other work that bypasses torch's dispatcher (a raw pointer given to a C function outside of a
custom op): then replays leave that work out, and the comparison with the function itself fails. Memory is not reused
between operations, so wrong lifetimes do not show.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

try:
    from triton.runtime import interpreter
except ImportError:
    interpreter = None

aten = torch.ops.aten

# The host would wait for the device to learn a number or a size. On a GPU all of them are illegal in a capture.
READS = {
    *(aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal, aten.nonzero, aten.argwhere, aten.bincount),
    *(aten.masked_select, aten._unique, aten._unique2, aten.unique_dim, aten.unique_consecutive),
    *(aten.allclose, aten.nonzero_numpy, aten.histc),
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
# torch.tensor(number, device=...) and the like: a copy from pageable memory, for which the host waits.
FROM_PYTHON = {aten.lift_fresh, aten.lift_fresh_copy, aten.lift}
TO_HOST = ("cpu", "numpy", "tolist", "item", "__bool__", "__int__", "__float__", "__index__", "__array__")


class CaptureError(RuntimeError):
    """A CUDA graph could not record this."""


class _Record(TorchDispatchMode):
    """Keeps every operation with what it took and gave."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[tuple[int, Tensor]]]] = []
        self.inside = False  # an operation, whose own steps are its business

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside:
            return func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in READS or packet in FROM_PYTHON:
            raise CaptureError(f"{func} is illegal while a CUDA graph is recorded")
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if packet in INDEXING and any(x.dtype in (torch.bool, torch.uint8) for x in inputs[1:]):
            raise CaptureError(f"{func} with a mask reads how many of its elements are true")
        out = self._run(func, args, kwargs)
        leaves = tree_leaves(out)
        if inputs and any(isinstance(x, bool | int | float) for x in leaves):
            raise CaptureError(f"{func} gives the host a number")
        memory = {x.untyped_storage()._cdata for x in inputs}
        fresh = [
            (i, x)
            for i, x in enumerate(leaves)
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in memory  # else a view, or changed in place
        ]
        self.operations.append((func, args, kwargs, fresh))
        return out

    def launch(self, original: Callable[..., Any], executor: Any, *args: Any, **kwargs: Any) -> None:
        """In the place of a launch in Triton's interpreter."""
        if self.inside:
            return original(executor, *args, **kwargs)
        self.operations.append((functools.partial(original, executor), args, kwargs, []))
        self._run(self.operations[-1][0], args, kwargs)
        return None

    def _run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.inside = True
        try:
            return func(*args, **kwargs)
        finally:
            self.inside = False

    @contextlib.contextmanager
    def on_a_device(self) -> Iterator[None]:
        """Inside, reading a tensor is an error, even where a CPU's dispatcher sees no trace; one_hot is as on a GPU."""

        def refuse(name: str) -> Callable[..., Any]:
            original = getattr(Tensor, name)

            def method(*args: Any, **kwargs: Any) -> Any:
                if self.inside:
                    return original(*args, **kwargs)
                raise CaptureError(f"Tensor.{name} reads a tensor on the host")

            return method

        def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            # A torch.device may be the tensor's own.
            if not self.inside and "cpu" in [x for x in (*args, *kwargs.values()) if isinstance(x, str)]:
                raise CaptureError("Tensor.to('cpu') copies a tensor to the host")
            return whole_to(tensor, *args, **kwargs)

        def one_hot(index: Tensor, classes: int) -> Tensor:  # on a CPU it reads the indices to check them
            return index.new_zeros(*index.shape, classes).scatter_(-1, index[..., None], 1)

        whole_to = Tensor.to
        with contextlib.ExitStack() as stack:
            for name in TO_HOST:
                stack.enter_context(mock.patch.object(Tensor, name, refuse(name)))
            stack.enter_context(mock.patch.object(Tensor, "to", to))
            stack.enter_context(mock.patch.object(torch.nn.functional, "one_hot", one_hot))
            if interpreter is not None:
                original = interpreter.GridExecutor.__call__
                launch = functools.partialmethod(_launch, self, original)
                stack.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", launch))
            yield


def _launch(executor: Any, record: _Record, original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    record.launch(original, executor, *args, **kwargs)


class RecordingGraph:
    """Records ``work`` and gives what repeats it; see the head of this file. A recorder for GraphedUpdate.

    Args:
        state: the tensors from before that ``work`` changes.
    """

    operations = 0  # of the last recording

    def __init__(self, state: Callable[[], Iterable[Tensor]]) -> None:
        self._state = state

    def warm_up(self, work: Callable[[], object]) -> None:
        """Run it."""
        work()

    @torch.no_grad()
    def record(self, work: Callable[[], object]) -> Callable[[], None]:
        """Record it. Other than with a CUDA graph it runs, so what it changed is put back."""
        mode = _Record()
        random = torch.get_rng_state()
        before = [(tensor, tensor.clone()) for tensor in self._state()]
        try:
            with mode.on_a_device(), mode, torch.enable_grad():
                work()
        finally:
            for tensor, value in before:
                tensor.copy_(value)
            torch.set_rng_state(random)
        self.operations = len(mode.operations)

        @torch.no_grad()
        def replay() -> None:
            for func, args, kwargs, fresh in mode.operations:
                leaves = tree_leaves(func(*args, **kwargs))
                for index, place in fresh:
                    place.copy_(leaves[index])

        return replay

    def recover(self) -> None:
        """Nothing to do."""

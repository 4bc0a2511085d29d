"""A CUDA graph on the CPU: records the operations of a function and repeats them on the same memory.

A CUDA graph repeats kernels with the addresses, shapes and constants that they had when it was recorded, and runs no
Python. :class:`RecordingGraph` does the same with torch's operations: every operation that reaches the dispatcher is
kept with its arguments; a replay runs it again and copies what it gives into the tensors that it gave when it was
recorded. So whatever a CUDA graph would freeze (a Python counter, a rate, a shape that depends on data, a tensor that
was replaced) is frozen here too, and the result differs from running the function again. Random operations draw anew.

What would stop a capture is an error at once (:class:`CaptureError`): reading a value on the host, shapes that depend
on data, copying a Python value to the device.

Limits: it does not see what bypasses torch's dispatcher (a raw pointer given to a C function outside of a custom op):
then replays leave that work out, and the comparison with the function itself fails. Memory is not reused between
operations, so wrong lifetimes do not show.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


@contextlib.contextmanager
def _on_a_device() -> Iterator[None]:
    """Inside, reading a tensor is an error, even where a CPU's dispatcher sees no trace; one_hot is as on a GPU."""

    def refuse(name: str) -> Callable[..., Any]:
        def method(*args: Any, **kwargs: Any) -> Any:
            raise CaptureError(f"Tensor.{name} reads a tensor on the host")

        return method

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if "cpu" in [x for x in (*args, *kwargs.values()) if isinstance(x, str)]:  # a torch.device may be the tensor's
            raise CaptureError("Tensor.to('cpu') copies a tensor to the host")
        return whole_to(tensor, *args, **kwargs)

    def one_hot(index: Tensor, classes: int) -> Tensor:  # on a CPU it reads the indices to check them, on a GPU not
        return index.new_zeros(*index.shape, classes).scatter_(-1, index[..., None], 1)

    whole_to = Tensor.to
    with contextlib.ExitStack() as stack:
        for name in TO_HOST:
            stack.enter_context(mock.patch.object(Tensor, name, refuse(name)))
        stack.enter_context(mock.patch.object(Tensor, "to", to))
        stack.enter_context(mock.patch.object(torch.nn.functional, "one_hot", one_hot))
        yield


class _Record(TorchDispatchMode):
    """Keeps every operation with what it took and gave, and memory from before as it was."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[tuple[int, Tensor]]]] = []
        self._created: set[int] = set()
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet in READS or packet in FROM_PYTHON:
            raise CaptureError(f"{func} is illegal while a CUDA graph is recorded")
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if packet in INDEXING and any(x.dtype in (torch.bool, torch.uint8) for x in inputs[1:]):
            raise CaptureError(f"{func} with a mask reads how many of its elements are true")
        self._keep(func, args, kwargs)
        out = func(*args, **kwargs)
        leaves = tree_leaves(out)
        if inputs and any(isinstance(x, bool | int | float) for x in leaves):
            raise CaptureError(f"{func} gives the host a number")
        memory = {x.untyped_storage()._cdata for x in inputs}
        fresh = [
            (i, x)
            for i, x in enumerate(leaves)
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in memory  # else a view, or changed in place
        ]
        self._created.update(x.untyped_storage()._cdata for _, x in fresh)
        self.operations.append((func, args, kwargs, fresh))
        return out

    def put_back(self) -> None:
        """Undo all changes of what was there before."""
        for storage, value in self._before.values():
            storage.copy_(value)

    def _keep(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Save what ``func`` is about to change."""
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            for tensor in tree_leaves(value):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._created and storage._cdata not in self._before:
                    self._before[storage._cdata] = (storage, storage.clone())


class RecordingGraph:
    """Records ``work`` and gives what repeats it; see the head of this file. A recorder for GraphedUpdate."""

    operations = 0  # of the last recording

    def warm_up(self, work: Callable[[], object]) -> None:
        """Run it."""
        work()

    def record(self, work: Callable[[], object]) -> Callable[[], None]:
        """Record it. Other than with a CUDA graph it runs, so what it changed is put back."""
        mode = _Record()
        random = torch.get_rng_state()
        try:
            with _on_a_device(), mode:
                work()
        finally:
            mode.put_back()
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

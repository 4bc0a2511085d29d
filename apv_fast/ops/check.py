"""Checks of op arguments, so that a bad one is named before any kernel reads memory."""

from __future__ import annotations

import torch
from torch import Tensor


class Arguments:
    """The tensors of one op call: sizes are bound by the first tensor that has them, the device by the first tensor.

    Args:
        op: name that errors begin with.
        sizes: sizes that are known beforehand, by name.
    """

    def __init__(self, op: str, **sizes: int) -> None:
        self.op = op
        self.sizes = sizes
        self.device: torch.device | None = None

    def tensor(self, name: str, x: Tensor, dims: str, dtype: torch.dtype | None = None) -> None:
        """Check that ``x`` has the dimensions ``dims`` ("B T E"), dtype ``dtype`` (None: floating) and one device.

        Raises:
            TypeError: not a tensor, or of another dtype.
            ValueError: another shape or device.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"{self.op}: {name} is a {type(x).__name__}; it must be a torch.Tensor")
        if dtype is None and not x.is_floating_point():
            raise TypeError(f"{self.op}: {name} has dtype {x.dtype}; it must be a floating-point tensor")
        if dtype is not None and x.dtype != dtype:
            raise TypeError(f"{self.op}: {name} has dtype {x.dtype}; it must be {dtype}")
        names, shape, sizes = dims.split(), x.shape, self.sizes
        fits = len(shape) == len(names)
        if fits:
            for dim, have in zip(names, shape, strict=True):
                want = sizes.get(dim)
                # Not `want in (None, have)`: torch.compile gets that wrong for sizes that it has made symbolic.
                if want is not None and want != have:
                    fits = False
                    break
        if not fits:
            known = ", ".join(f"{dim}={sizes[dim]}" for dim in names if sizes.get(dim) is not None)
            with_sizes = f" with {known}" if known else ""
            raise ValueError(f"{self.op}: {name} has shape {tuple(shape)}; it must be [{', '.join(names)}]{with_sizes}")
        device = x.device
        if self.device is not None and device != self.device:
            raise ValueError(f"{self.op}: {name} is on {device}; it must be on {self.device} like the other arguments")
        self.device = device
        sizes.update(zip(names, shape, strict=True))

    def require(self, condition: bool, message: str) -> None:
        """Raise ValueError with ``message`` unless ``condition``."""
        if not condition:
            raise ValueError(f"{self.op}: {message}")

"""Keras' Adam as the official code drives it: one clip by global norm, decay of every weight, then Adam."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from apv_fast import mixed_precision
from apv_fast.backend import resolve
from apv_fast.reference.keras_adam import Settings

ALIGNMENT = 64  # numbers: where a weight's moments begin in the flat buffers, so that kernels can read 16 bytes


class KerasAdam(torch.optim.Optimizer):
    """``w −= lr·√(1 − β₂ᵗ)/(1 − β₁ᵗ) · m/(√v + ε)``: ε joins the *uncorrected* √v, unlike in ``torch.optim.Adam``.

    A step clips the gradients by their global norm, multiplies every weight (with or without a gradient) by
    ``1 − weight_decay``, whatever the learning rate, and then takes Adam's step. It never waits for the device, so it
    can be recorded in a CUDA graph: the rate ``group["lr"]`` (float64) and the number of steps ``group["iteration"]``
    (int64) are scalars on the device. Moments are pieces of flat buffers. Checkpoints hold plain numbers.

    Args:
        params: the weights, one group; on their final device.
        lr: learning rate. Between steps it may be set, ``group["lr"] = 0.0``, or changed in place,
            ``group["lr"].fill_(0.0)``; for the replays of a recorded step, only in place. 0 lets the moments and the
            decay run on.
        eps: ε.
        clip: largest global norm; infinity for none.
        weight_decay: share of each weight that a step takes away.
        betas: decay of the first and the second moment.
        backend: see :mod:`apv_fast.backend`; the kernel for GPUs takes float32 and float64 weights of one dtype.
        copies: weights of which modules ask for casts (:func:`apv_fast.mixed_precision.cast`), and to what. A backend
            that can writes them in the pass of the step, and nothing is cast; with the others modules go on casting.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 3e-4,
        *,
        eps: float = 1e-5,
        clip: float = 100.0,
        weight_decay: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        backend: str | None = None,
        copies: Mapping[Tensor, torch.dtype] | None = None,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"KerasAdam: {name} is {value}; it must be at least 0")
        if not clip > 0:
            raise ValueError(f"KerasAdam: clip is {clip}; it must be positive")
        defaults = {"lr": lr, "eps": eps, "clip": clip, "weight_decay": weight_decay, "betas": betas, "iteration": 0}
        super().__init__(params, defaults)
        weights: list[Tensor] = self.param_groups[0]["params"]
        self._rate = torch.full((), lr, dtype=torch.float64, device=weights[0].device)
        self._iteration = torch.zeros((), dtype=torch.int64, device=weights[0].device)
        self._first, self._second = _flat_like(weights), _flat_like(weights)
        self._adopt_state()
        step = resolve("keras_adam", weights[0].detach(), backend)
        self._copies: list[Tensor | None] = [None for _ in weights]
        if copies and getattr(step, "writes_copies", False):
            self._copies = [mixed_precision.keep_copy(w, copies[w]) if w in copies else None for w in weights]
            self._take = step(weights, self._first, self._second, self._copies)
        else:
            self._take = step(weights, self._first, self._second)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """For the constructor alone.

        Raises:
            ValueError: there is a group already.
        """
        if self.param_groups:
            raise ValueError("KerasAdam: params has more than one group; it must be one, since one norm is clipped")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor:  # type: ignore[override]
        """Take a step and return the gradients' global norm before the clip (scalar tensor)."""
        if closure is not None:
            raise ValueError("KerasAdam: closure is not supported; compute the gradients before step()")
        (group,) = self.param_groups
        if group["lr"] is not self._rate:
            self._rate.fill_(group["lr"])
            group["lr"] = self._rate
        settings = Settings(group["eps"], group["clip"], group["weight_decay"], tuple(group["betas"]))
        norm: Tensor = self._take([p.grad for p in group["params"]], self._rate, self._iteration, settings)
        copied = (p for p, copy in zip(group["params"], self._copies, strict=True) if copy is not None)
        mixed_precision.mark_written(copied)
        return norm

    def refresh_copies(self) -> None:
        """Write the copies of weights that something but a step has changed; before a recorded step is replayed."""
        mixed_precision.refresh_copies(self.param_groups[0]["params"])

    def state_dict(self) -> dict[str, Any]:
        """Moments "m" and "v" of every weight, settings, and the rate and the number of steps as numbers."""
        state = super().state_dict()
        for group in state["param_groups"]:
            group["lr"], group["iteration"] = float(group["lr"]), int(group["iteration"])
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put a checkpoint's moments, settings, rate and number of steps back, in place."""
        super().load_state_dict(state_dict)
        (group,) = self.param_groups
        for p, first, second in zip(group["params"], self._first, self._second, strict=True):
            saved = self.state.get(p, {})  # older checkpoints have no moments of weights that never had a gradient
            first.copy_(saved["m"]) if saved else first.zero_()
            second.copy_(saved["v"]) if saved else second.zero_()
        self._rate.fill_(group["lr"])
        self._iteration.fill_(group["iteration"])
        self._adopt_state()

    def __getstate__(self) -> dict[str, Any]:
        ours = ("_rate", "_iteration", "_first", "_second", "_copies", "_take")
        return super().__getstate__() | {name: getattr(self, name) for name in ours}

    def _adopt_state(self) -> None:
        """Show our tensors where torch.optim keeps an optimiser's state."""
        (group,) = self.param_groups
        group["lr"], group["iteration"] = self._rate, self._iteration
        for p, first, second in zip(group["params"], self._first, self._second, strict=True):
            self.state[p] = {"m": first, "v": second}


def _flat_like(weights: list[Tensor]) -> list[Tensor]:
    """Zeros of each weight's shape and strides, pieces of one buffer a dtype and device."""
    sizes = [-(-w.numel() // ALIGNMENT) * ALIGNMENT for w in weights]
    kinds = [(w.dtype, w.device) for w in weights]
    buffers = {
        kind: torch.zeros(sum(n for n, k in zip(sizes, kinds, strict=True) if k == kind), dtype=kind[0], device=kind[1])
        for kind in set(kinds)
    }
    pieces, used = [], dict.fromkeys(buffers, 0)
    for w, size, kind in zip(weights, sizes, kinds, strict=True):
        strides = torch.empty_like(w).stride()
        pieces.append(buffers[kind].as_strided(w.shape, strides, used[kind]))
        used[kind] += size
    return pieces

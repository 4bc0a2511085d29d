"""Keras' Adam as the official code drives it: one clip by global norm, decay of every weight, then Adam."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class KerasAdam(torch.optim.Optimizer):
    """``w −= lr·√(1 − β₂ᵗ)/(1 − β₁ᵗ) · m/(√v + ε)``: ε joins the *uncorrected* √v, unlike in ``torch.optim.Adam``.

    A step clips the gradients by their global norm, multiplies every weight (with or without a gradient) by
    ``1 − weight_decay``, whatever the learning rate, and then takes Adam's step.

    Args:
        params: the weights, one group.
        lr: learning rate; ``group["lr"]`` may be set between steps, 0 lets the moments and the decay run on.
        eps: ε.
        clip: largest global norm; infinity for none.
        weight_decay: share of each weight that a step takes away.
        betas: decay of the first and the second moment.
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
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"KerasAdam: {name} is {value}; it must be at least 0")
        if not clip > 0:
            raise ValueError(f"KerasAdam: clip is {clip}; it must be positive")
        defaults = {"lr": lr, "eps": eps, "clip": clip, "weight_decay": weight_decay, "betas": betas, "iteration": 0}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor:  # type: ignore[override]
        """Take a step and return the gradients' global norm before the clip (scalar tensor)."""
        if closure is not None:
            raise ValueError("KerasAdam: closure is not supported; compute the gradients before step()")
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
        for group in self.param_groups:
            self._step_group(group, norm)
        return norm

    def _step_group(self, group: dict[str, Any], norm: Tensor) -> None:
        group["iteration"] += 1
        t, (beta1, beta2) = group["iteration"], group["betas"]
        rate = group["lr"] * math.sqrt(1 - beta2**t) / (1 - beta1**t)
        scale = (group["clip"] / norm).clamp(max=1)
        for p in group["params"]:
            p.mul_(1 - group["weight_decay"])
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["m"], state["v"] = torch.zeros_like(p), torch.zeros_like(p)
            grad = p.grad * scale
            state["m"].lerp_(grad, 1 - beta1)
            state["v"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            p.addcdiv_(state["m"], state["v"].sqrt().add_(group["eps"]), value=-rate)

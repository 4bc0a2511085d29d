"""Which implementation of an op runs: one table of op × backend, and the rule that picks one.

Limits: a backend is chosen per op call from its first tensor; mixing devices within a call is an error of the op.
Under ``torch.compile`` the choice is made when the graph is traced.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

# op -> backend -> "module:function". A later backend adds a column here and nothing else changes. Every
# function in a row takes the fields of the op's call; modules are imported when first used.
IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "knn_bonus": {
        "reference": "apv_fast.reference.knn_bonus:knn_bonus",
        "cpu": "apv_fast.cpu.knn_bonus:knn_bonus",
        "triton": "apv_fast.kernels.knn_bonus:knn_bonus",
    },
    "video_bonus": {
        "reference": "apv_fast.reference.video_bonus:video_bonus",
        "cpu": "apv_fast.cpu.video_bonus:video_bonus",
        "triton": "apv_fast.kernels.video_bonus:video_bonus",
    },
    "lambda_return": {
        "reference": "apv_fast.reference.lambda_return:lambda_return",
        "cpu": "apv_fast.cpu.lambda_return:lambda_return",
        "triton": "apv_fast.kernels.lambda_return:lambda_return",
    },
    "image_loss": {
        "reference": "apv_fast.reference.image_loss:image_loss",
        "cpu": "apv_fast.cpu.image_loss:image_loss",
        "triton": "apv_fast.kernels.image_loss:image_loss",
    },
    "normalize_image": {
        "reference": "apv_fast.reference.image_loss:normalize_image",
        "cpu": "apv_fast.cpu.image_loss:normalize_image",
        "triton": "apv_fast.kernels.image_loss:normalize_image",
    },
    "image_encoder": {
        "reference": "apv_fast.reference.image_model:image_encoder",
        "cpu": "apv_fast.cpu.image_model:image_encoder",
        "triton": "apv_fast.kernels.image_model:image_encoder",  # cuDNN's
    },
    "image_decoder": {
        "reference": "apv_fast.reference.image_model:image_decoder",
        "cpu": "apv_fast.cpu.image_model:image_decoder",
        "triton": "apv_fast.kernels.image_model:image_decoder",  # cuDNN's, but for its first convolution
    },
    "mlp": {
        "reference": "apv_fast.reference.mlp:mlp",
        "cpu": "apv_fast.cpu.mlp:mlp",
        "triton": "apv_fast.reference.mlp:mlp",  # cuBLAS's
    },
    "keras_adam": {
        "reference": "apv_fast.reference.keras_adam:Step",
        "cpu": "apv_fast.cpu.keras_adam:Step",
        "triton": "apv_fast.kernels.keras_adam:Step",
    },
    "kl_balance": {
        "reference": "apv_fast.reference.kl_balance:kl_balance",
        "cpu": "apv_fast.cpu.kl_balance:kl_balance",
        "triton": "apv_fast.kernels.kl_balance:kl_balance",
    },
    "kl_balance_normal": {
        "reference": "apv_fast.reference.kl_balance:kl_balance_normal",
        "cpu": "apv_fast.cpu.kl_balance:kl_balance_normal",
        "triton": "apv_fast.kernels.kl_balance:kl_balance_normal",
    },
    "rssm_observe": {
        "reference": "apv_fast.reference.rssm_observe:rssm_observe",
        "cpu": "apv_fast.cpu.rssm_observe:rssm_observe",
        "triton": "apv_fast.kernels.rssm_observe:rssm_observe",
        "cuda": "apv_fast.cuda.rssm_observe:rssm_observe",
    },
    "rssm_imagine": {
        "reference": "apv_fast.reference.rssm_imagine:rssm_imagine",
        "cpu": "apv_fast.cpu.rssm_imagine:rssm_imagine",
        "triton": "apv_fast.kernels.rssm_imagine:rssm_imagine",
    },
    "rssm_step": {
        "reference": "apv_fast.reference.rssm_step:rssm_step",
        "cpu": "apv_fast.cpu.rssm_step:rssm_step",
        "triton": "apv_fast.kernels.rssm_step:rssm_step",
    },
    "rssm_rollout": {
        "reference": "apv_fast.reference.rssm_rollout:rssm_rollout",
        "cpu": "apv_fast.cpu.rssm_rollout:rssm_rollout",
        "triton": "apv_fast.kernels.rssm_rollout:rssm_rollout",
    },
    "policy": {  # classes: of apv_fast.agent.policy.Policy
        "reference": "apv_fast.agent.policy:ModulePolicy",
        "cpu": "apv_fast.cpu.policy:CpuPolicy",
        "triton": "apv_fast.agent.policy:ModulePolicy",
    },
    "stacked_observe": {
        "reference": "apv_fast.reference.stacked_observe:stacked_observe",
        "cpu": "apv_fast.cpu.stacked_observe:stacked_observe",
        "triton": "apv_fast.kernels.stacked_observe:stacked_observe",
        "cuda": "apv_fast.cuda.stacked_observe:stacked_observe",
    },
}

# backend -> whose function is meant where a row has none of its own: CUDA C++ is the scans, Triton has all the rest.
STANDS_IN: dict[str, str] = {"cuda": "triton"}

# (op, backend) -> "module:function" of a tensor and the sizes that the op names, for those that cannot run all sizes:
# why this one cannot run, or an empty string.
OBSTACLES: dict[tuple[str, str], str] = {
    ("image_encoder", "cpu"): "apv_fast.cpu.image_model:obstacle",
    ("image_decoder", "cpu"): "apv_fast.cpu.image_model:obstacle",
    ("rssm_observe", "cpu"): "apv_fast.cpu.rssm_observe:obstacle",
    ("stacked_observe", "cpu"): "apv_fast.cpu.rssm_observe:obstacle",
    ("rssm_observe", "cuda"): "apv_fast.cuda.rssm_observe:obstacle",
    ("stacked_observe", "cuda"): "apv_fast.cuda.stacked_observe:obstacle",
}

# backend -> "module:function" that reports whether it can run here; imported on first use, must never raise.
PROBES: dict[str, str] = {
    "reference": "apv_fast.reference:probe",
    "cpu": "apv_fast.cpu:probe",
    "triton": "apv_fast.kernels:probe",
    "cuda": "apv_fast.cuda:probe",
}

# What "auto" tries, best first, by the device that the tensors are on.
AUTO_ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),
}

ENVIRONMENT_VARIABLE = "APV_FAST_BACKEND"

_selected: contextvars.ContextVar[str | None] = contextvars.ContextVar("apv_fast_backend", default=None)


class BackendError(RuntimeError):
    """The backend that was asked for cannot run this; the message says why and what would."""


@dataclass(frozen=True)
class Status:
    """What a backend's probe found on this machine."""

    available: bool
    reason: str = ""  # why it is not available and what to do about it; empty if it is
    devices: tuple[str, ...] = ()  # types of the devices whose tensors it takes, "cpu" or "cuda"
    isa: str = ""  # instruction set or GPU architecture it would use
    dtypes: tuple[torch.dtype, ...] = ()


@dataclass(frozen=True)
class BackendInfo:
    """One row of :func:`backends`."""

    name: str
    status: Status
    ops: tuple[str, ...]  # ops that it implements

    @property
    def available(self) -> bool:
        """Whether it can run here."""
        return self.status.available

    def __str__(self) -> str:
        if not self.available:
            return f"{self.name}: not available: {self.status.reason}"
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.status.dtypes)
        devices = ", ".join(self.status.devices)
        others = f"; all others: {STANDS_IN[self.name]}'s" if self.name in STANDS_IN else ""
        return f"{self.name}: on {devices} ({self.status.isa}); {dtypes}; ops: {', '.join(self.ops)}{others}"


@functools.cache
def load(target: str) -> Any:
    """What a table names as "module:name", imported when it is first asked for."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _implementation(op: str, backend: str) -> Callable[..., Any]:
    function: Callable[..., Any] = load(IMPLEMENTATIONS[op][backend])
    return function


@functools.cache
def probe(backend: str) -> Status:
    """The (cached) status of one backend on this machine."""
    try:
        status: Status = load(PROBES[backend])()
    except ImportError as error:  # apv_fast.kernels is a folder of its own, which only an installation maps
        return Status(False, f"{error}; install apv-fast (make install, or pip install -e .)")
    return status


def backends() -> dict[str, BackendInfo]:
    """Every backend by name: available or why not, devices, instruction set, dtypes, ops."""
    return {
        name: BackendInfo(name, probe(name), tuple(op for op, row in IMPLEMENTATIONS.items() if name in row))
        for name in PROBES
    }


def _check_name(name: str, source: str) -> str:
    if name != "auto" and name not in PROBES:
        raise BackendError(f"{source}: unknown backend {name!r}; must be one of: auto, {', '.join(PROBES)}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops inside the ``with`` block on backend ``name`` unless a call names another itself.

    Raises:
        BackendError: ``name`` is unknown or cannot run on this machine.
    """
    _check_name(name, "use_backend")
    if name != "auto" and not probe(name).available:
        raise BackendError(f"backend {name!r} cannot run here: {probe(name).reason}")
    token = _selected.set(name)
    try:
        yield
    finally:
        _selected.reset(token)


def requested(argument: str | None) -> str:
    """The backend that a call asks for: its argument, else ``use_backend``, else the environment, else "auto"."""
    if argument not in (None, "", "auto"):
        return _check_name(argument, "backend")
    selected = _selected.get()
    if selected is not None:
        return selected
    return _check_name(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)


def _transformed() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp, ...) or forward-mode differentiation is going on."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def _obstacle(op: str, backend: str, tensor: torch.Tensor, sizes: dict[str, int]) -> str | None:
    """Why ``backend`` cannot run ``op`` on ``tensor``, or None if it can."""
    if backend not in IMPLEMENTATIONS[op]:
        return f"it does not implement {op} (those that do: {', '.join(IMPLEMENTATIONS[op])})"
    status = probe(backend)
    if not status.available:
        return status.reason
    if backend != "reference" and _transformed():
        return "its kernels know nothing of torch.func's transforms or forward-mode derivatives"
    if tensor.device.type not in status.devices:
        return f"it takes tensors on {' or '.join(status.devices)}, not on {tensor.device.type}"
    if tensor.dtype not in status.dtypes:
        names = ", ".join(str(dtype) for dtype in status.dtypes)
        return f"it does not take {tensor.dtype} (it takes: {names})"
    if sizes and (op, backend) in OBSTACLES:
        why: str = load(OBSTACLES[op, backend])(tensor, **sizes)
        return why or None
    return None


def obstacles(op: str, tensor: torch.Tensor, **sizes: int) -> dict[str, str | None]:
    """The backends that "auto" tries for ``op``, best first, and why each cannot run it; None if it can."""
    order = AUTO_ORDER.get(tensor.device.type, ("reference",))
    return {candidate: _obstacle(op, candidate, tensor, sizes) for candidate in order}


def _named(op: str, name: str, tensor: torch.Tensor, sizes: dict[str, int]) -> tuple[str, str | None]:
    """The backend whose function ``name`` means for ``op``, and why that cannot run it; None if it can."""
    other = STANDS_IN.get(name)
    if other is None or name in IMPLEMENTATIONS[op]:
        return name, _obstacle(op, name, tensor, sizes)
    if not probe(name).available:
        return name, probe(name).reason
    why = _obstacle(op, other, tensor, sizes)
    return other, why and f"it does not implement {op}, and {other!r}, which does that for it, cannot run it: {why}"


def choose(op: str, tensor: torch.Tensor, backend: str | None = None, **sizes: int) -> str:
    """Name of the backend that runs ``op`` for ``tensor``; ``sizes`` are what :data:`OBSTACLES` of the op ask for.

    It is the requested one, or what :data:`STANDS_IN` names for it where it does not implement the op at all.

    Raises:
        BackendError: the requested backend cannot run it; nothing else is tried in its place.
    """
    name = requested(backend)
    if name == "auto":
        tried = obstacles(op, tensor, **sizes)
        able = next((candidate for candidate, why in tried.items() if why is None), None)
        if able is None:
            reasons = "; ".join(f"{candidate!r}: {why}" for candidate, why in tried.items())
            raise BackendError(f"no backend can run {op}: {reasons}")
        return able
    able, obstacle = _named(op, name, tensor, sizes)
    if obstacle:
        by_environment = _selected.get() is None and backend in (None, "", "auto")
        remedy = f"unset {ENVIRONMENT_VARIABLE}, and 'auto'" if by_environment else "backend='auto'"
        raise BackendError(f"backend {name!r} cannot run {op}: {obstacle}; {remedy} picks one that can")
    return able


def resolve(op: str, tensor: torch.Tensor, backend: str | None = None, **sizes: int) -> Callable[..., Any]:
    """The function that runs ``op`` for ``tensor``; see :func:`choose`."""
    return _implementation(op, choose(op, tensor, backend, **sizes))

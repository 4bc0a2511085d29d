"""Which backend runs each op and why, how Triton's scan is driven, facts about the GPU."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Iterable, Mapping

import torch

from apv_fast.backend import IMPLEMENTATIONS, OBSTACLES, choose, obstacles, requested, use_backend

_COOPERATIVE_LAUNCH = 95  # CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH in cuda.h


def op_backends(
    ops: Iterable[str],
    device: torch.device,
    backend: str = "auto",
    dtype: torch.dtype = torch.float32,
    sizes: Mapping[str, int] | None = None,
) -> list[str]:
    """A line for every backend that runs some of ``ops`` on ``device``, and why no better one does.

    Args:
        ops: names of ops.
        device: of the tensors.
        backend: what is asked for.
        dtype: of the products of the RSSM; the other ops get float32.
        sizes: for the ops that some backend cannot run at all sizes, see :data:`apv_fast.backend.OBSTACLES`.

    Raises:
        BackendError: one of the ops cannot run on the backend that is asked for.
    """
    lines: dict[tuple[str, str], list[str]] = {}
    for op in ops:
        products = dtype if op.startswith(("rssm", "stacked")) else torch.float32
        tensor = torch.empty(0, device=device, dtype=products)
        of_op = (sizes or {}) if any(limited == op for limited, _ in OBSTACLES) else {}
        name = choose(op, tensor, backend, **of_op)
        lines.setdefault((name, _why_not_better(op, tensor, name, backend, of_op)), []).append(op)
    return [f"{name} on {device}: {', '.join(names)}{why}" for (name, why), names in lines.items()]


def _why_not_better(op: str, tensor: torch.Tensor, chosen: str, backend: str, sizes: Mapping[str, int]) -> str:
    """The obstacles of what "auto" tried before it came to ``chosen``."""
    if (asked := requested(backend)) != "auto":
        return " (as asked for)" if chosen == asked else f" (asked for {asked}, which has none of them)"
    before = []
    for name, why in obstacles(op, tensor, **sizes).items():
        if name == chosen:
            break
        before.append(f"not {name}: {why if name in IMPLEMENTATIONS[op] else 'it has none of them'}")
    return f" ({'; '.join(before)})" if before else ""


def auto_backends() -> list[str]:
    """What "auto" picks for every op on every device here, whatever the environment asks for."""
    devices = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    with use_backend("auto"):
        return [line for device in devices for line in op_backends(IMPLEMENTATIONS, torch.device(device))]


def triton_scan(device: torch.device) -> list[str]:
    """How the Triton scan would be driven on a GPU, and why; nothing elsewhere.

    Raises:
        BackendError: the environment asks for a driver that cannot run there.
    """
    if device.type != "cuda":
        return []
    try:
        module = importlib.import_module("apv_fast.kernels.parts.grid")
    except ImportError as error:
        return [f"triton's scan on {device}: none ({error})"]
    name, reason = module.scan_driver(device)
    return [f"triton's scan on {device}: {name} ({reason})"]


def gpu_facts(index: int) -> str:
    """Name, architecture, size, driver and cooperative launch of one GPU."""
    properties = torch.cuda.get_device_properties(index)
    version, cooperative = _driver(index)
    return (
        f"GPU {index}: {properties.name}, sm_{properties.major}{properties.minor}, "
        f"{properties.multi_processor_count} multiprocessors, {properties.total_memory / 2**30:.1f} GiB, "
        f"driver for CUDA {version}, cooperative launch: {cooperative}"
    )


def _driver(index: int) -> tuple[str, str]:
    """CUDA version of the driver, and whether it launches cooperative grids on a GPU, which torch does not tell."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "unknown", "unknown"
    version, device, value = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    failed = (
        driver.cuInit(0)
        or driver.cuDriverGetVersion(ctypes.byref(version))
        or driver.cuDeviceGet(ctypes.byref(device), index)
        or driver.cuDeviceGetAttribute(ctypes.byref(value), _COOPERATIVE_LAUNCH, device)
    )
    if failed:
        return "unknown", f"unknown (CUDA error {failed})"
    return f"{version.value // 1000}.{version.value % 1000 // 10}", "yes" if value.value else "no"

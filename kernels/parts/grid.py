"""A barrier among all programs of a launch, and whether a device can run such a launch.

The launch must be cooperative, so that all programs are resident; one a multiprocessor always is when the kernel fits
at all, and the scan's tiles are cut for one a multiprocessor. The barrier counts arrivals in one int32 that a memset
clears before the launch (a CUDA graph repeats it) and that only grows, so no program can mistake a later round for
its own::

    all warps have stored                      bar.sync
    one thread adds 1 and releases             atom.add.acq_rel.gpu
    one thread waits for programs·round        ld.acquire.gpu
    all warps go on                            bar.sync

By PTX's memory model this orders the stores of every thread before the barrier with the loads of every thread after it:
both bar.sync and the release are cumulative. Triton's interpreter cannot run the assembly, so there the wait adds 0
instead; one program passes at once, and the tests' cooperative interpreter lets other programs run meanwhile.
"""
# Kernels are Triton, not Python.
# mypy: allow-untyped-decorators, disable-error-code="no-untyped-def"

from __future__ import annotations

import ctypes
import functools
import logging
import os

import torch
import triton
import triton.language as tl

from apv_fast.backend import BackendError

from .scan_arguments import Device
from .tiles import INTERPRETED

ENVIRONMENT_VARIABLE = "APV_FAST_SCAN"
DRIVERS = ("persistent", "phases")
_COOPERATIVE_LAUNCH = 95  # CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH
_INTERPRETED = Device(programs=1, shared=2**20, interpret=True)
_log = logging.getLogger(__name__)

_WAIT = tl.constexpr("""
{
    .reg .pred waits, less;
    .reg .b32 thread, seen;
    mov.u32 thread, %tid.x;
    setp.eq.u32 waits, thread, 0;
    mov.u32 seen, $2;
again:
    @waits ld.acquire.gpu.global.u32 seen, [$1];
    setp.lt.s32 less, seen, $2;
    @less bra again;
    mov.u32 $0, seen;
}
""")


@triton.jit
def grid_barrier(counter, arrivals):
    """Wait until ``arrivals`` programs in all have come: programs·round, rounds from 1. All programs must call it."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    if INTERPRETED:
        while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < arrivals:
            pass
    else:
        tl.inline_asm_elementwise(_WAIT, "=r,l,r", [counter, arrivals], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


@functools.cache
def device_of(index: int | None) -> Device:
    """Multiprocessors and shared memory of a CUDA device; None: the interpreter."""
    if index is None:
        return _INTERPRETED
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    major, _ = torch.cuda.get_device_capability(index)
    return Device(properties["multiprocessor_count"], properties["max_shared_mem"], interpret=False, major=major)


def _obstacle(device: torch.device) -> str:
    """Why no cooperative launch is possible on ``device``; empty if it is."""
    if device.type != "cuda":
        return ""  # Triton's interpreter: of one program, whose barriers open at once
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"the CUDA driver library cannot be asked for cooperative launches ({error})"
    able = ctypes.c_int()
    index = torch.cuda.current_device() if device.index is None else device.index
    if driver.cuDeviceGetAttribute(ctypes.byref(able), _COOPERATIVE_LAUNCH, index):
        return f"the CUDA driver does not say whether GPU {index} can launch cooperatively"
    return "" if able.value else f"GPU {index} or its driver cannot launch cooperatively"


@functools.cache
def _reason(device: torch.device) -> str:
    reason = _obstacle(device)
    if reason:
        _log.warning("the RSSM scan launches every phase on its own, which is slower: %s", reason)
    return reason


def scan_driver(device: torch.device) -> tuple[str, str]:
    """How the RSSM scan runs on ``device``: "persistent" (one launch) or "phases" (one a phase), and why.

    Raises:
        BackendError: the environment asks for a driver that does not exist or cannot run here.
    """
    wanted = os.environ.get(ENVIRONMENT_VARIABLE, "").strip().lower() or "auto"
    if wanted not in ("auto", *DRIVERS):
        raise BackendError(f"{ENVIRONMENT_VARIABLE} is {wanted!r}; it must be one of: auto, {', '.join(DRIVERS)}")
    if wanted == "phases":
        return wanted, f"{ENVIRONMENT_VARIABLE} asks for it"
    reason = _reason(device)
    if wanted == "persistent" and reason:
        raise BackendError(f"{ENVIRONMENT_VARIABLE}=persistent cannot run here: {reason}; 'phases' or 'auto' can")
    return ("phases", reason) if reason else ("persistent", "cooperative launches work")

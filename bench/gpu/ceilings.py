"""What the machine can do: the ceilings that :mod:`bench.cost` takes in place of a data sheet's. One function a figure.

Every function returns numbers under the names that :func:`bench.cost.machine.with_ceilings` knows, or under others that
are only reported. Times are medians of device events. Products and copies are of random data.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from statistics import median

import torch

from bench.gpu.graphs import capture

Figures = dict[str, float]
DEVICE = "cuda"


def events(work: Callable[[], object], runs: int = 10, warm_up: int = 3) -> float:
    """Median milliseconds of ``work`` on the device's clock."""
    for _ in range(warm_up):
        work()
    times = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def device() -> dict[str, float | str]:
    """Name, multiprocessors, L2, memory, driver, clocks, and how the Triton scan would run."""
    properties = torch.cuda.get_device_properties(0)
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    answer = ""
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip().partition("\n")[0]
    except (OSError, subprocess.TimeoutExpired) as error:
        answer = f"nvidia-smi: {error}"
    return {
        "GPU": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "sms": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "scan driver": _scan_driver(),
        f"nvidia-smi {query}": answer,
    }


def _scan_driver() -> str:
    try:
        from apv_fast.kernels.parts.grid import scan_driver

        return ": ".join(scan_driver(torch.device(DEVICE)))
    except (ImportError, RuntimeError) as error:  # a fact among others, which must not cost the others
        return f"{type(error).__name__}: {error}"


def copy() -> Figures:
    """Bytes read and written a second by a device-to-device copy of 2 GB."""
    source = torch.randint(0, 255, (2 * 1024**3,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    seconds = events(lambda: target.copy_(source)) / 1e3
    return {"copy_tb_s": 2 * source.numel() / seconds / 1e12}


def matrix(size: int = 8192) -> Figures:
    """Operations a second of torch's product of two square matrices in three precisions."""
    figures = {}
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        seconds = events(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), runs=7, warm_up=2) / 1e3  # type: ignore[misc]
        figures[f"{name}_tflop_s"] = 2 * size**3 / seconds / 1e12
    torch.set_float32_matmul_precision("highest")
    return figures


def launch(count: int = 1000) -> Figures:
    """Microseconds of a small kernel after another: called from PyTorch, and as a node of a CUDA graph."""
    x = torch.zeros(1, device=DEVICE)

    def chain() -> None:
        for _ in range(count):
            x.add_(1)

    return {
        "eager_launch_us": 1e3 * events(chain, runs=5) / count,
        "graph_node_us": 1e3 * events(capture(chain).replay, runs=10) / count,
    }


def gather(size: int = 256 * 1024, rounds: int = 400) -> Figures:
    """Bytes a second from L2 when every multiprocessor reads the same buffer, as the phases of a scan do."""
    from bench.gpu.gather import BLOCK, read_kernel

    sms = torch.cuda.get_device_properties(0).multi_processor_count
    source = torch.randint(-1000, 1000, (size // 4,), dtype=torch.int32, device=DEVICE)
    sums = torch.empty(sms * BLOCK, dtype=torch.int32, device=DEVICE)

    def work() -> None:
        read_kernel[(sms,)](source, sums, source.numel(), ROUNDS=rounds, BLOCK=BLOCK, num_warps=8)

    seconds = events(work) / 1e3
    expected = rounds * int(source.sum())
    totals = sums.view(sms, BLOCK).sum(1)
    if not bool((totals == expected).all()):
        raise RuntimeError(f"the kernel that reads summed to {totals[0].item()}, not {expected}")
    return {"l2_read_tb_s": sms * rounds * size / seconds / 1e12}


CEILINGS: dict[str, Callable[[], Figures]] = {"copy": copy, "matrix": matrix, "launch": launch, "l2": gather}

"""The machines that the model knows, and how measurements replace their figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

KB, MB = 1024, 1024**2


@dataclass(frozen=True)
class Machine:
    """Rates in bytes, operations and seconds of a GPU, or a CPU, whose cores are its SMs, L3 its L2, DRAM its HBM."""

    name: str
    sms: int
    clock: float  # Hz
    hbm: float  # bytes a second, read and written together
    l2: float  # bytes a second from L2 to all SMs
    l2_size: int
    rates: Mapping[str, float]  # operations a second by unit: "bf16", "tf32" on tensor cores, "fp32" on the others
    shared: int  # bytes of shared memory that one block may have
    barrier: float  # one grid barrier
    launch: float  # one node of a CUDA graph
    store: float = 0.0  # until what was stored before a barrier is where everybody reads it
    shared_width: int = 128  # bytes an SM reads from its shared memory in a clock
    cached: bool = False  # whether a part that fits into L2 may find there what it reads and leave what it writes
    fused: bool = False  # whether bias and ELU ride on every product, and features are rounded on their way into one

    @property
    def resident(self) -> int:
        """Bytes of weights that an SM can keep: shared memory less 32 KB to work in, and a quarter of its registers."""
        return self.shared - 32 * KB + 64 * KB


# Peaks are dense. SMs, clocks, bandwidth, L2 and peaks: NVIDIA's "H100 Tensor Core GPU Architecture" (SXM5) and "A100
# Tensor Core GPU Architecture" (SXM4 80GB) papers; shared memory: CUDA's compute capabilities 9.0 and 8.0.
# L2 is an assumption: the A100's paper gives 5120 bytes a clock (7.2 TB/s) as its peak, Chips and Cheese (July 2023)
# read 5.5 to 6 TB/s on an H100 PCIe with 114 SMs. So are barrier and launch: 0.73 and 0.83 µs on a 3090 (MegaQwen), and
# what stores before a barrier add, which its measurement without any does not show: a trip to the far half of L2.
# The H200 is an H100 with other memory. Its copies (4.3 TB/s read and written), bf16 products (769 to 798 TFLOP/s on
# random data), L2 size and clock were measured on one; tf32 is taken to be half of bf16, fp32 is the data sheet's.
MACHINES = {
    "h200": Machine(
        name="H200 SXM",
        sms=132,
        clock=1.98e9,
        hbm=4.3e12,
        l2=7.0e12,
        l2_size=60 * MB,
        rates={"bf16": 785e12, "tf32": 392e12, "fp32": 67e12},
        shared=227 * KB,
        barrier=1.1e-6,
        launch=1.2e-6,
        store=0.4e-6,
    ),
    "h100": Machine(
        name="H100 SXM",
        sms=132,
        clock=1.83e9,
        hbm=3.35e12,
        l2=7.0e12,
        l2_size=50 * MB,
        rates={"bf16": 989e12, "tf32": 495e12, "fp32": 67e12},
        shared=227 * KB,
        barrier=1.1e-6,
        launch=1.2e-6,
        store=0.4e-6,
    ),
    "a100": Machine(
        name="A100 SXM 80GB",
        sms=108,
        clock=1.41e9,
        hbm=2.04e12,
        l2=5.0e12,
        l2_size=40 * MB,
        rates={"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12},
        shared=163 * KB,
        barrier=1.2e-6,
        launch=1.5e-6,
        store=0.4e-6,
    ),
}

# The 2-core machine of our figures (Zen 5 server, AVX-512): clock by its FMA peak, 64 fp32 operations a clock and core;
# 1 MB of L2 a core, 32 MB of L3. Barriers, some 0.1 ms of a scan, are left out. ``bench.ceilings`` measures the rates.
CPU = Machine(
    name="CPU, 2 cores",
    sms=2,
    clock=3.75e9,
    hbm=40e9,
    l2=170e9,
    l2_size=32 * MB,
    rates={"bf16": 960e9, "tf32": 480e9, "fp32": 480e9},
    shared=1 * MB,
    barrier=0.0,
    launch=0.0,
    cached=True,
    fused=True,
)

# Names of the ceilings in bench.device's file -> (field, factor to the model's unit).
_FIELDS = {
    "barrier_us": ("barrier", 1e-6),
    "graph_node_us": ("launch", 1e-6),
    "copy_tb_s": ("hbm", 1e12),
    "l2_read_tb_s": ("l2", 1e12),
}
_RATES = {"bf16_tflop_s": "bf16", "tf32_tflop_s": "tf32", "fp32_tflop_s": "fp32"}
_COUNTS = {"sms": "sms", "l2_bytes": "l2_size"}


def with_ceilings(machine: Machine, ceilings: Mapping[str, float], name: str = "") -> Machine:
    """``machine`` with what was measured in place of what was assumed; unknown names are left alone."""
    changes: dict[str, object] = {"name": name or machine.name}
    for key, (field, factor) in _FIELDS.items():
        if key in ceilings:
            changes[field] = ceilings[key] * factor
    for key, field in _COUNTS.items():
        if key in ceilings:
            changes[field] = int(ceilings[key])
    measured = {unit: ceilings[key] * 1e12 for key, unit in _RATES.items() if key in ceilings}
    return replace(machine, rates={**machine.rates, **measured}, **changes)  # type: ignore[arg-type]

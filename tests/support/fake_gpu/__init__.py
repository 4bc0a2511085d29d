"""A GPU that is not there, for everything around the kernels: choice of engine, launch code, compilation on first use.

``install()`` lets Triton's own driver and launcher run on a CUDA driver that does nothing (``libcuda.c``), and tensors
in the CPU's memory pass for CUDA tensors. Kernels are compiled for sm_90 as on an H100, and launched into the void:
what they would have written is not written. So results mean nothing; that nothing raises is what is tested. For a
process of its own, without ``TRITON_INTERPRET``.

The CUDA C++ library cannot be had so cheaply: its runtime asks a driver for more. ``emulate_cuda()`` puts the tests'
emulator in its place, behind the same interface and the same checks.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.support import ROOT

CAPABILITY = (9, 0)
PROPERTIES = SimpleNamespace(
    name="no GPU", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30, L2_cache_size=50 * 2**20,
    shared_memory_per_block_optin=232448, warp_size=32,
)  # fmt: skip


def build(folder: Path) -> Path:
    """Compile the driver into ``folder/libcuda.so.1`` and return its path."""
    import triton.backends.nvidia

    include = Path(triton.backends.nvidia.__path__[0], "include")
    library = folder / "libcuda.so.1"
    source = Path(__file__).with_name("libcuda.c")
    compiler = os.environ.get("CC", "cc")
    flags = ["-shared", "-fPIC", "-O1", f"-Wl,-soname,{library.name}", f"-I{include}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    return library


def install(folder: Path) -> ctypes.CDLL:
    """Make this process believe in the GPU; returns the driver, whose counters are ``fake_launches/_cooperative``."""
    library = ctypes.CDLL(str(build(folder)), ctypes.RTLD_GLOBAL)  # loaded under its name: later loads find this one
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    _pretend_torch()
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    class FakeDriver(CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.get_current_device = lambda: 0
            self.set_current_device = lambda index: None
            self.get_current_stream = lambda index: 0
            self.get_device_capability = lambda index=0: CAPABILITY

    driver.set_active(FakeDriver())
    return library


def emulate_cuda(folder: Path) -> list[str]:
    """Give the CUDA C++ backend the emulator of its kernels; returns the list in which its launches will be."""
    from apv_fast import cuda
    from apv_fast.cuda import rssm_observe as observe
    from apv_fast.cuda.parts.library import Library

    source = ROOT / "csrc" / "cuda" / "host" / "emulate.cpp"
    path = folder / "emulated.so"
    flags = ["-O1", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden"]
    subprocess.run([os.environ.get("CXX", "c++"), *flags, str(source), "-o", str(path)], check=True)
    emulated: Any = Library(path)
    launches: list[str] = []
    emulated.c.apv_emulator(3, 1 << 18, ctypes.c_uint64(0), False, -1)
    launch = emulated.launch

    def counted(direction: str, *arguments: Any) -> str:
        launches.append(direction)
        return launch(direction, *arguments)

    emulated.launch = counted
    cuda.PATH = path
    cuda.library = observe.scan.library = lambda: emulated  # type: ignore[assignment]
    streams: Any = torch.cuda
    streams.current_stream = lambda device=None: SimpleNamespace(cuda_stream=0)
    return launches


def _pretend_torch() -> None:
    """CUDA's answers where the launch code asks for them."""
    tensor: Any = torch.Tensor
    tensor.is_cuda = property(lambda self: True)
    tensor.get_device = lambda self: 0
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.current_device = lambda: 0
    cuda.device_count = lambda: 1
    cuda.get_device_capability = lambda device=None: CAPABILITY
    cuda.get_device_properties = lambda device=None: PROPERTIES
    cuda.get_device_name = lambda device=None: PROPERTIES.name
    cuda.device = lambda device: contextlib.nullcontext()

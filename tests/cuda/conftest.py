"""The emulated CUDA scan: its library, and a backend of it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator

import pytest
import torch

from apv_fast import backend as backends
from apv_fast.cuda.parts.library import Library
from apv_fast.cuda.parts.recurrence import CudaScan
from tests.support.cuda_emulator import AMPLE, SOURCE

COMPILER = shutil.which("c++") or shutil.which("g++")


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    if COMPILER is None:
        pytest.skip("there is no C++ compiler; Debian: apt install build-essential")
    path = tmp_path_factory.mktemp("emulator") / "emulated.so"
    flags = ["-O1", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden"]
    subprocess.run([COMPILER, *flags, str(SOURCE), "-o", str(path)], check=True)
    return Library(path)


@pytest.fixture
def emulate(library: Library, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., CudaScan]]:
    """Makes a core on a new imaginary GPU, and a backend "emulated" in the table that uses it. NaN is what torch gives
    for memory that nothing wrote."""
    core = CudaScan(lambda: library)

    def configure(
        blocks: int = 3, shared: int = AMPLE, seed: int = 0, shuffle: bool = False, fault: int = -1
    ) -> CudaScan:
        library.c.apv_emulator(blocks, shared, ctypes.c_uint64(seed), shuffle, fault)
        core._planned.cache_clear()
        return core

    monkeypatch.setitem(backends.PROBES, "emulated", "tests.support.cuda_emulator:probe")
    monkeypatch.setitem(backends.IMPLEMENTATIONS["rssm_observe"], "emulated", "tests.support.cuda_emulator:observe")
    monkeypatch.setitem(backends.OBSTACLES, ("rssm_observe", "emulated"), "tests.support.cuda_emulator:obstacle")
    monkeypatch.setitem(
        backends.IMPLEMENTATIONS["stacked_observe"], "emulated", "tests.support.cuda_emulator:stacked_observe"
    )
    monkeypatch.setattr("tests.support.cuda_emulator.current.library", lambda: library)
    monkeypatch.setattr("tests.support.cuda_emulator.current._planned", core._planned)
    torch.use_deterministic_algorithms(True)
    configure()
    yield configure
    torch.use_deterministic_algorithms(False)
    backends.probe.cache_clear()

"""The CUDA scan's plan: what fits on which GPU, and what is said of what does not."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch

from apv_fast import backend as backends
from apv_fast import cuda, ops
from apv_fast.backend import BackendError, Status
from apv_fast.cuda import rssm_observe as cuda_observe
from apv_fast.cuda.parts.library import Library, Scan
from apv_fast.cuda.parts.recurrence import CudaScan
from apv_fast.cuda.stacked_observe import obstacle as stacked_obstacle
from apv_fast.types import Latent
from tests.support.cuda_emulator import AMPLE, SOURCE
from tests.support.rssm_cases import SIZES, make_problem, params_of

# Multiprocessors, and shared memory of a block.
H100, A100, B200, RTX_5090, RTX_5070 = (132, 232448), (108, 166912), (148, 232448), (170, 101376), (48, 101376)


@pytest.mark.parametrize(
    ("gpu", "batch", "direction", "resident"),
    [
        (H100, 16, 0, True),
        (H100, 16, 1, True),
        (H100, 50, 0, True),
        (H100, 50, 1, False),
        (A100, 16, 0, False),
        (A100, 16, 1, False),
        (B200, 16, 1, True),
        (B200, 50, 0, True),
        (RTX_5090, 16, 0, False),
        (RTX_5090, 50, 0, False),
        (RTX_5090, 50, 1, False),
        (RTX_5070, 16, 1, False),
    ],
)
def test_plan_at_full_size(library: Library, gpu: tuple[int, int], batch: int, direction: int, resident: bool) -> None:
    """Every weight stays on the chip where it should, and what does not is 16.8 MB of workspace."""
    scan = Scan(batch=batch, length=50, deter=1024, hidden=1024, stoch=32, discrete=32)
    library.c.apv_plan_for.restype = ctypes.c_char_p
    assert library.c.apv_plan_for(ctypes.byref(scan), direction, *gpu) is None
    assert scan.blocks == min(128, gpu[0])
    assert scan.shared_bytes <= gpu[1]
    assert (scan.workspace_bytes < 2**21) == resident


def test_a_plan_that_a_small_gpu_refuses(library: Library) -> None:
    """48 multiprocessors own three tiles each, and their state of 50 rows is more than 99 KB."""
    scan = Scan(batch=50, length=50, deter=1024, hidden=1024, stoch=32, discrete=32)
    library.c.apv_plan_for.restype = ctypes.c_char_p
    for direction, state in ((0, 120768), (1, 151360)):
        refused = library.c.apv_plan_for(ctypes.byref(scan), direction, *RTX_5070)
        expected = f"its state takes {state} bytes of shared memory a block, and there are 101376"
        assert refused is not None and refused.decode() == expected


def test_which_gpus_have_code(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """A generation runs the code of its first GPU; the library says what its nvcc knew."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "PATH", SOURCE)  # a file that is there
    monkeypatch.setattr(cuda, "library", lambda: library)

    def status(*capability: int, built: str = "800,900,1000,1200") -> Status:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
        monkeypatch.setattr(library.c, "apv_architectures", lambda: built.encode())
        return cuda.probe()

    expected = {
        (8, 6): "sm_80",
        (8, 9): "sm_80",
        (9, 0): "sm_90a",
        (10, 0): "sm_100",
        (10, 3): "sm_100",
        (12, 1): "sm_120",
    }
    for capability, isa in expected.items():
        assert (status(*capability).available, status(*capability).isa) == (True, isa)
    for capability in ((7, 5), (11, 0)):
        why = "there is no code for compute capability {}.{}, only for sm_80, sm_90a, sm_100, sm_120".format(
            *capability
        )
        assert status(*capability).reason.startswith(why)
    assert status(9, 0, built="800,900").available
    assert "has no code for sm_120, which its nvcc did not know" in status(12, 0, built="800,900").reason


def test_sizes_that_do_not_fit(emulate: Callable[..., CudaScan], monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by name: an error that says why. By "auto": the next backend."""
    emulate(shared=4096)
    sizes = SIZES["odd"]
    tensors = make_problem(sizes, torch.bfloat16)
    call = (params_of(tensors), tensors["embed"], tensors["is_first"], tensors["action"])
    with pytest.raises(
        BackendError, match=r"'emulated' cannot run rssm_observe: a forward scan of these sizes: its state"
    ):
        ops.rssm_observe(*call, latent=sizes.latent, backend="emulated")
    monkeypatch.setitem(backends.AUTO_ORDER, "cpu", ("emulated", "reference"))
    for shared, expected in ((4096, "reference"), (AMPLE, "emulated")):
        emulate(shared=shared)
        assert backends.choose("rssm_observe", tensors["embed"], **FITS) == expected


FITS: dict[str, Any] = {"batch": 3, "deter": 9, "hidden": 5, "stoch": 3, "discrete": 7}


def test_a_stack_fits_if_both_models_do(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def refuse(device: torch.device, batch: int, deter: int, hidden: int, latent: Latent) -> str:
        asked.append(deter)
        return "too wide" if deter == 10 else ""

    monkeypatch.setattr(cuda_observe.scan, "obstacle", refuse)
    for af_deter, deter, expected in ((9, 9, [9, 9]), (10, 9, [10]), (9, 10, [9, 10])):
        asked.clear()
        sizes = FITS | {"deter": deter, "af_deter": af_deter, "af_hidden": 5, "af_stoch": 3, "af_discrete": 7}
        assert stacked_obstacle(torch.empty(0), **sizes) == ("" if deter == af_deter else "too wide")
        assert asked == expected

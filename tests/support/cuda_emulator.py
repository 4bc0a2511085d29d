"""The CUDA scan's source on an emulator of its threads, as a backend "emulated"; its fixtures are in tests/cuda."""

from __future__ import annotations

import torch
from torch import Tensor

from apv_fast.backend import Status
from apv_fast.cuda.parts.library import Library
from apv_fast.cuda.parts.recurrence import CudaScan
from apv_fast.recurrence.observe import observe_on
from apv_fast.recurrence.stacked import TwoScans, stacked_on
from apv_fast.types import Latent
from tests.support import ROOT

SOURCE = ROOT / "csrc" / "cuda" / "host" / "emulate.cpp"
AMPLE = 1 << 18  # bytes of shared memory: all weights fit


def not_yet() -> Library:
    raise AssertionError("the fixture emulate sets the library")


current = CudaScan(not_yet)
observe = observe_on("emulated", current)
stacked_observe = stacked_on("emulated", TwoScans(current))


def obstacle(tensor: Tensor, batch: int, deter: int, hidden: int, stoch: int, discrete: int) -> str:
    return current.obstacle(tensor.device, batch, deter, hidden, Latent(stoch, discrete))


def probe() -> Status:
    return Status(True, devices=("cpu",), isa="emulator", dtypes=(torch.bfloat16,))

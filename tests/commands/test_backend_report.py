"""What info and a run's beginning say about the path that is taken, on machines that are not here."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import types
from dataclasses import replace
from typing import Any

import pytest
import torch

import apv_fast
from apv_fast import backend, kernels
from apv_fast.backend import BackendError, Status
from apv_fast.commands import info
from apv_fast.commands.parts import backend_report
from apv_fast.commands.parts.device import replay_place
from apv_fast.config import PRESETS, ConfigError
from tests.support import ROOT

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine with a GPU, as far as anyone asks; change its ``capability`` and ``cooperative``."""
    machine: dict[str, Any] = {"capability": (9, 0), "cooperative": 1, "failure": 0}

    def properties(index: int) -> types.SimpleNamespace:
        major, minor = machine["capability"]
        return types.SimpleNamespace(
            name="NVIDIA Test", major=major, minor=minor, multi_processor_count=132, total_memory=80 * 2**30
        )

    def attribute(value: Any, which: int, device: Any) -> int:
        assert which == 95
        ctypes.cast(value, ctypes.POINTER(ctypes.c_int))[0] = machine["cooperative"]
        return int(machine["failure"])

    def version(value: Any) -> int:
        ctypes.cast(value, ctypes.POINTER(ctypes.c_int))[0] = 13010
        return 0

    driver = types.SimpleNamespace(
        cuInit=lambda flags: 0,
        cuDriverGetVersion=version,
        cuDeviceGet=lambda device, index: 0,
        cuDeviceGetAttribute=attribute,
    )
    driver_only = types.SimpleNamespace(CDLL=lambda name: driver, c_int=ctypes.c_int, byref=ctypes.byref)
    monkeypatch.setattr(backend_report, "ctypes", driver_only)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: machine["capability"])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return machine


def test_facts_about_a_gpu(gpu: dict[str, Any]) -> None:
    start = "GPU 0: NVIDIA Test, sm_90, 132 multiprocessors, 80.0 GiB, driver for CUDA 13.1, cooperative launch: "
    assert backend_report.gpu_facts(0) == start + "yes"
    gpu["cooperative"] = 0
    assert backend_report.gpu_facts(0) == start + "no"
    gpu["failure"] = 3
    assert backend_report.gpu_facts(0).endswith("driver for CUDA unknown, cooperative launch: unknown (CUDA error 3)")


def test_facts_without_a_driver(gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(backend_report, "ctypes", types.SimpleNamespace(CDLL=missing))
    assert backend_report.gpu_facts(0).endswith("driver for CUDA unknown, cooperative launch: unknown")


def test_an_old_gpu_has_the_reference(gpu: dict[str, Any]) -> None:
    assert kernels.probe().available
    gpu["capability"] = (7, 5)
    status = kernels.probe()
    assert not status.available
    assert status.reason == "the GPU is sm_75; the kernels need sm_80 or newer; use 'reference'"


def statuses(monkeypatch: pytest.MonkeyPatch, **status_of: Status) -> None:
    monkeypatch.setattr(backend, "probe", lambda name: status_of.get(name, Status(False, "not built")))
    on_meta = types.SimpleNamespace(empty=lambda size, device, dtype: torch.empty(size, dtype=dtype, device="meta"))
    monkeypatch.setattr(backend_report, "torch", types.SimpleNamespace(**vars(on_meta), float32=torch.float32))
    monkeypatch.setitem(backend.AUTO_ORDER, "meta", backend.AUTO_ORDER["cuda"])


def test_every_op_says_who_runs_it_and_why_not_a_better_one(monkeypatch: pytest.MonkeyPatch) -> None:
    every = (torch.float32, torch.bfloat16)
    statuses(
        monkeypatch,
        triton=Status(True, devices=("meta",), dtypes=(torch.float32,)),
        reference=Status(True, devices=("meta",), dtypes=every),
    )
    table = {"rssm_observe": {"triton": "", "reference": ""}, "kl_balance": {"cuda": "", "reference": ""}}
    monkeypatch.setattr(backend, "IMPLEMENTATIONS", table)
    monkeypatch.setattr(backend_report, "IMPLEMENTATIONS", table)
    assert backend_report.op_backends(table, GPU) == [
        "triton on cuda:0: rssm_observe (not cuda: it has none of them)",
        "reference on cuda:0: kl_balance (not cuda: not built; not triton: it has none of them)",
    ]
    (line, _) = backend_report.op_backends(table, GPU, dtype=torch.bfloat16)
    assert line == (
        "reference on cuda:0: rssm_observe (not cuda: it has none of them; "
        "not triton: it does not take torch.bfloat16 (it takes: torch.float32))"
    )
    assert backend_report.op_backends(["kl_balance"], GPU, "reference") == [
        "reference on cuda:0: kl_balance (as asked for)"
    ]
    with pytest.raises(BackendError, match="backend 'cuda' cannot run kl_balance: not built; backend='auto' picks"):
        backend_report.op_backends(["kl_balance"], GPU, "cuda")


def test_what_cuda_leaves_to_triton_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    can = Status(True, devices=("meta",), dtypes=(torch.float32,))
    statuses(monkeypatch, cuda=can, triton=can)
    table = {"rssm_observe": {"cuda": "", "triton": ""}, "kl_balance": {"triton": ""}}
    for module in (backend, backend_report):
        monkeypatch.setattr(module, "IMPLEMENTATIONS", table)
    monkeypatch.setattr(backend, "OBSTACLES", {})
    assert backend_report.op_backends(table, GPU, "cuda") == [
        "cuda on cuda:0: rssm_observe (as asked for)",
        "triton on cuda:0: kl_balance (asked for cuda, which has none of them)",
    ]


def test_sizes_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    can = Status(True, devices=("meta",), dtypes=(torch.float32,))
    statuses(monkeypatch, cuda=can, reference=can)
    table = {name: {"cuda": "", "reference": ""} for name in ("rssm_observe", "kl_balance")}
    for module in (backend, backend_report):
        monkeypatch.setattr(module, "IMPLEMENTATIONS", table)
        obstacle = "tests.commands.test_backend_report:too_large"
        monkeypatch.setattr(module, "OBSTACLES", {("rssm_observe", "cuda"): obstacle})
    assert backend_report.op_backends(table, GPU, sizes={"deter": 4}) == ["cuda on cuda:0: rssm_observe, kl_balance"]
    assert backend_report.op_backends(table, GPU, sizes={"deter": 5}) == [
        "reference on cuda:0: rssm_observe (not cuda: deter is 5, at most 4 fits; not triton: it has none of them)",
        "cuda on cuda:0: kl_balance",
    ]
    with pytest.raises(BackendError, match="backend 'cuda' cannot run rssm_observe: deter is 5, at most 4 fits"):
        backend_report.op_backends(table, GPU, "cuda", sizes={"deter": 5})


def too_large(tensor: torch.Tensor, deter: int) -> str:
    return f"deter is {deter}, at most 4 fits" if deter > 4 else ""


def test_the_scans_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from apv_fast.kernels.parts import grid

    assert backend_report.triton_scan(CPU) == []
    monkeypatch.setattr(grid, "scan_driver", lambda device: ("phases", "no cooperative launch"))
    assert backend_report.triton_scan(GPU) == ["triton's scan on cuda:0: phases (no cooperative launch)"]


def test_info_on_a_gpu(gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device) -> list[str]:
        raise BackendError("APV_FAST_SCAN is 'x'; it must be one of: auto, persistent, phases")

    monkeypatch.setattr(apv_fast, "backends", dict)
    monkeypatch.setattr(info, "auto_backends", lambda: ["triton on cuda:0: rssm_observe"])
    monkeypatch.setattr(info, "triton_scan", broken)
    report = info.report()
    for line in (
        "GPU 0: NVIDIA Test, sm_90,",
        "auto takes triton on cuda:0: rssm_observe",
        "APV_FAST_SCAN is 'x'; it must be one of",
        "updates: one CUDA graph each on a GPU",
    ):
        assert f"\n{line}" in report


def test_info_does_not_care_what_the_environment_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "cuda")
    assert "\nauto takes " in info.report()


def test_where_batches_come_from(gpu: dict[str, Any]) -> None:
    config = PRESETS["small"].pretrain
    assert replay_place(config, CPU) == {"pin_memory": False}
    rows = replay_place(config, GPU)["rows"]
    assert (rows.device, rows.strict, rows.budget) == (GPU, False, int(0.4 * 80 * 2**30))
    assert replay_place(replace(config, replay_device="host"), GPU) == {"pin_memory": True}
    strict = replay_place(replace(config, replay_device="device"), GPU)
    assert strict["rows"].strict and strict["pin_memory"]
    with pytest.raises(ConfigError, match="replay_device is 'device', but the device is cpu"):
        replay_place(replace(config, replay_device="device"), CPU)


def test_the_agent_needs_no_simulator_and_no_command_line() -> None:
    """On a machine that only computes."""
    code = """
import sys
for name in ("pydantic", "tyro", "gymnasium", "dm_control", "mujoco", "metaworld", "tensorboard", "matplotlib"):
    sys.modules[name] = None
import apv_fast.ops, apv_fast.nn, apv_fast.commands.parts.backend_report
from apv_fast.agent import Agent, Pretrainer
from apv_fast.config import PRESETS
print(PRESETS["small"].finetune.graph)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "auto\n", done.stderr

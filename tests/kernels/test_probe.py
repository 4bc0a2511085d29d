"""The package of Triton kernels: imported lazily, once, and clear about why it cannot run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from apv_fast import kernels


def run_python(code: str, **environment: str) -> str:
    """What ``code`` prints in a new process that does not interpret Triton kernels unless told to."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    process = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_import_does_not_import_triton() -> None:
    code = "import sys, apv_fast.kernels; apv_fast.kernels.probe(); print('triton' in sys.modules)"
    assert run_python(code).strip() == "False"


def test_a_second_copy_under_another_name_is_refused() -> None:
    spec = importlib.util.spec_from_file_location("kernels", kernels.__file__)
    assert spec is not None and spec.loader is not None
    with pytest.raises(ImportError, match=r"import apv_fast\.kernels"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_probe_without_triton_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status = kernels.probe()
    assert not status.available
    assert "pip install triton" in status.reason


def test_probe_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    status = kernels.probe()
    assert (status.available, status.devices, status.isa) == (True, ("cpu",), "interpreter")


def test_probe_without_a_gpu_names_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status = kernels.probe()
    assert not status.available
    assert "no CUDA device" in status.reason and "TRITON_INTERPRET=1" in status.reason


def test_probe_on_a_gpu_names_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    status = kernels.probe()
    assert (status.available, status.devices, status.isa) == (True, ("cuda",), "sm_90")

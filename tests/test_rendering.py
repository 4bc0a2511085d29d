"""Rendering beside the compilers that torch brings."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

_SCRIPT = """
from apv_fast import envs
env = envs.make("dmc:cartpole-balance", seed=0, quality="fast")
env.reset()
import triton
env.step(env.action_space.sample())
env.close()
print("survived")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_triton_can_be_imported_after_rendering() -> None:
    result = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "survived", result.stderr

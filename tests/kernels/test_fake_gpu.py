"""What surrounds the kernels on a GPU, as far as it goes without one: see ``tests/support/fake_gpu``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tests.support import ROOT

pytest.importorskip("triton")
# Whole updates go through every op with bfloat16 and seeds; these take the other ways through the scan.
CASES = ["updates", "updates cuda", "observe gaussian", "observe phases", "step"]


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="the fake driver needs a C compiler")
def test_everything_launches() -> None:
    """The engines that a GPU would get compile on first use and launch, from single ops to whole updates."""
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "APV_FAST_BACKEND")}
    command = [sys.executable, "-m", "tests.support.fake_gpu", *CASES]
    process = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr + process.stdout
    lines = process.stdout.splitlines()
    assert [line.startswith("ok") for line in lines] == [True] * len(CASES)
    launches = {line.split(":")[0].removeprefix("ok").strip(): line for line in lines}
    assert ", 0 cooperative" not in launches["updates"]  # both scans, forward and backward
    assert ", 0 cooperative" in launches["observe phases"]
    # By name: all scans, of one model and of two, on the CUDA library, and everything else as Triton's launches.
    cuda = launches["updates cuda"]
    assert ", 0 cooperative, 3 forward in CUDA C++, 3 backward in CUDA C++" in cuda
    assert int(cuda.split()[3]) > 200

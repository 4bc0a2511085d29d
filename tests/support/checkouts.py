"""Python in a process of its own, in a checkout."""

from __future__ import annotations

import subprocess
import sys

from bench.gpu.checkout import ROOT, environment


def run_python(code: str, **env: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(**env), capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return process.stdout

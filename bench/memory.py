"""How much memory forward and backward of a case need at most: ``python -m bench.memory CASE CONTESTANT``.

Each contestant runs in a process of its own. The kernel knows the most that a process ever had resident (VmHWM of
``/proc/self/status``) and forgets it on request (5 into ``clear_refs``). So: make the inputs; run the same case with
one sequence of one step, which loads libraries and starts threads; read what is resident; forget the peak; run the case
once; read the peak. The difference counts everything, be it torch's, the libraries' or our own working memory, the
results included. The C library is told to return freed blocks at once, and all the contestants pay for that alike.

Limits: Linux. Pages, not bytes: some hundred kilobytes more or less.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from bench.registry import FORWARD_BACKWARD, Case, Work, select, wider

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 120  # after which a process is given up
RETURN_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(64 * 2**10), "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}
CPU = torch.device("cpu")


def peak(case: Case, contestant: str) -> float:
    """Megabytes (10^6) above what was there before.

    Raises:
        RuntimeError: it could not be measured; says why.
    """
    command = [sys.executable, "-m", "bench.memory", case.name, contestant]
    environment = {**os.environ, **RETURN_AT_ONCE, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=SECONDS
        )
        return float(done.stdout)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(error.stderr.strip().rpartition("\n")[2] or f"exit status {error.returncode}") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{case.name} of {contestant} took over {SECONDS} s") from None


def _work(case: Case, contestant: str, **changes: int) -> Work:
    changed = Case(case.op, {**case.shape, **changes}, case.dtype, case.build, case.uses, wider=case.wider)
    if contestant in case.wider:
        return wider(changed, CPU)[contestant].prepare()[FORWARD_BACKWARD]
    return functools.partial(case.build(CPU, case.dtype, **changed.shape).passes[FORWARD_BACKWARD], contestant)


def _status(field: str) -> int:
    """Bytes."""
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"the kernel does not tell {field}")
    return 1024 * int(match[1])


def measure(case: Case, contestant: str) -> float:
    """Megabytes, in this process."""
    torch.manual_seed(0)
    work = _work(case, contestant)
    _work(case, contestant, B=1, T=1)()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result = work()
    after = _status("VmHWM")
    del result
    return (after - before) / 1e6


def main(arguments: list[str]) -> int:
    """Print the megabytes: of a new process, unless this one was started with the settings that it needs."""
    name, contestant = arguments
    case = next(case for case in select(name, slow=True) if case.name == name)
    ready = RETURN_AT_ONCE.items() <= os.environ.items()
    print(round(measure(case, contestant) if ready else peak(case, contestant), 2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

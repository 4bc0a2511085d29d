"""``python -m bench.gpu.worker MODULE``: the child of :class:`bench.gpu.jobs.Worker`.

Reads jobs as lines of JSON from its input, calls ``MODULE.run(kind, arguments, tell)`` and answers on its output. What
the job itself prints goes to the error output. After an error that may have broken the CUDA context the parent is told
to start another child. Dies with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
from typing import Any, BinaryIO

# Of errors after which CUDA or torch's allocator is in no state to go on; the last two: a graph could not be recorded.
SIGNS = ("CUDA error", "AcceleratorError", "device-side assert", "CaptureError", "recorded as a CUDA graph")
PR_SET_PDEATHSIG = 1


class Tell:
    """What a job says while it runs.

    Args:
        output: where the parent reads.
    """

    def __init__(self, output: BinaryIO) -> None:
        self._output = output

    def event(self, **event: Any) -> None:
        """One line."""
        self._output.write(json.dumps(event).encode() + b"\n")
        self._output.flush()

    def stage(self, name: str) -> None:
        """Contestant ``name`` is at work from now on, and to blame if nothing else is heard."""
        self.event(event="stage", name=name)

    def item(self, item: Any) -> None:
        """A part of the result, which the parent keeps whatever happens next."""
        self.event(event="item", item=item)

    def finished(self, name: str) -> None:
        """Everything about contestant ``name`` has been told: a second try goes without it."""
        self.event(event="finished", name=name)


def is_broken(error: BaseException) -> bool:
    """Whether this process had better not use its GPU any more."""
    text = f"{type(error).__name__}: {error}"
    return any(sign in text for sign in SIGNS)


def message(error: BaseException) -> str:
    """The kind of an error and its first line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:400]


def _work(module: Any, request: dict[str, Any], tell: Tell) -> None:
    try:
        result = module.run(request["kind"], request["arguments"], tell)
    except Exception as error:
        traceback.print_exc()
        tell.event(event="failed", error=message(error), fatal=is_broken(error))
    else:
        tell.event(event="done", result=result)


def main() -> None:
    """Serve until the input ends."""
    with contextlib.suppress(OSError, AttributeError):  # a parent that is killed cannot stop a kernel that hangs
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # from here on print() and libraries write to the log
    from bench.gpu.checkout import arrange

    arrange()
    module, tell = importlib.import_module(sys.argv[1]), Tell(output)
    tell.event(event="ready")
    for line in sys.stdin.buffer:
        _work(module, json.loads(line), tell)


if __name__ == "__main__":
    main()

"""``python -m bench.gpu.worker MODULE``: the child of :class:`bench.gpu.jobs.Worker`.

Reads jobs as lines of JSON from its input, calls ``MODULE.run(kind, arguments, stage)`` and answers on its output. What
the job itself prints goes to the error output. After an error that may have broken the CUDA context the parent is told
to start another child.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from typing import Any, BinaryIO

# Of errors after which CUDA or torch's allocator is in no state to go on; the last two: a graph could not be recorded.
SIGNS = ("CUDA error", "AcceleratorError", "device-side assert", "CaptureError", "recorded as a CUDA graph")


def is_broken(error: BaseException) -> bool:
    """Whether this process had better not use its GPU any more."""
    text = f"{type(error).__name__}: {error}"
    return any(sign in text for sign in SIGNS)


def message(error: BaseException) -> str:
    """The kind of an error and its first line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:400]


def _work(module: Any, request: dict[str, Any], output: BinaryIO) -> None:
    def answer(**event: Any) -> None:
        output.write(json.dumps(event).encode() + b"\n")
        output.flush()

    def stage(name: str) -> None:
        answer(event="stage", name=name)

    try:
        result = module.run(request["kind"], request["arguments"], stage)
    except Exception as error:
        traceback.print_exc()
        answer(event="failed", error=message(error), fatal=is_broken(error))
    else:
        answer(event="done", result=result)


def main() -> None:
    """Serve until the input ends."""
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # from here on print() and libraries write to the log
    from bench.gpu.checkout import arrange

    arrange()
    module = importlib.import_module(sys.argv[1])
    output.write(b'{"event": "ready"}\n')
    output.flush()
    for line in sys.stdin.buffer:
        _work(module, json.loads(line), output)


if __name__ == "__main__":
    main()

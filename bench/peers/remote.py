"""A peer in a process of its own, as a contestant beside ours: what it imports and sets stays there.

The parent asks for an update and waits until the child says that its device has done it, so a run's time has the way
through a pipe in it, some 0.1 ms: nothing beside an update's. While a contestant of ours runs, the child only waits.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from bench.gpu.checkout import ROOT, environment
from bench.peers.setup import PeerError

VARIABLES = {  # peer -> the environment variable with the path of its checkout or wheel
    "contextwm": "APV_FAST_PEER_CONTEXTWM",
    "r2dreamer": "APV_FAST_PEER_R2DREAMER",
    "torchrl": "APV_FAST_PEER_TORCHRL",
}
TITLES = {"contextwm": "ContextWM", "r2dreamer": "r2dreamer", "torchrl": "TorchRL"}
PRETRAINS = ("contextwm",)  # the others have no pre-training on videos
START_SECONDS = 240.0  # to import, to build, to compile, to warm up
UPDATE_SECONDS = 60.0
LAST_SECONDS = 5.0  # for a process that has closed its output to end by itself


def named(op: str) -> dict[str, Path]:
    """The peers that have this update and whose path an environment variable gives."""
    able = [name for name in VARIABLES if op == "finetune_update" or name in PRETRAINS]
    return {name: Path(os.environ[VARIABLES[name]]) for name in able if os.environ.get(VARIABLES[name])}


class Remote:
    """A peer's process; it ends with this object.

    Args:
        name: of :data:`VARIABLES`.
        path: its checkout.
        op: of :data:`bench.peers.setup.UPDATES`.
        shape: as in the rows of our own updates.
        dtype: of :data:`bench.peers.setup.DTYPES`.
        device: "cpu" or "cuda".

    Raises:
        PeerError: the peer cannot be timed, and why.
    """

    def __init__(self, name: str, path: Path, op: str, shape: Mapping[str, int], dtype: str, device: str) -> None:
        flags = {"B": "batch", "T": "length"}
        sizes = [f"--{flags.get(key, key).replace('_', '-')}={size}" for key, size in shape.items()]
        command = [sys.executable, "-m", "bench.peers", name, "--serve", f"--path={path}", f"--update={op}"]
        command += [f"--dtype={dtype}", f"--device={device}", *sizes]
        self.name, self._buffer = name, b""
        # Its errors go where ours go: the log of whoever runs this.
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self._process = process
        self.stop = weakref.finalize(self, _end, process)
        ready = self._next(START_SECONDS)
        if ready["event"] != "ready":
            self.stop()
            raise PeerError(str(ready["error"]))
        self.facts: dict[str, Any] = ready["facts"]

    def update(self) -> None:
        """One update, done when this returns.

        Raises:
            PeerError: the process died or takes too long.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"update\n")
        except (OSError, ValueError) as error:  # it has ended, or has been ended
            raise self._lost() from error
        event = self._next(UPDATE_SECONDS)
        if event["event"] != "done":
            raise PeerError(f"{self.name}: {event['error']}")

    def _next(self, seconds: float) -> dict[str, Any]:
        pipe: IO[bytes] | None = self._process.stdout
        assert pipe is not None
        end = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([pipe], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                self.stop()
                raise PeerError(f"{self.name}: no answer in {seconds:.0f} s")
            chunk = os.read(pipe.fileno(), 1 << 16)
            if not chunk:
                raise self._lost()
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        event: dict[str, Any] = json.loads(line)
        return event

    def _lost(self) -> PeerError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(LAST_SECONDS)
        self.stop()
        return PeerError(f"{self.name}: the process died, exit status {self._process.returncode}; see its output")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()

"""Steps as processes of this machine, which share its cores and GPUs."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from apv_fast.experiments.runner import Job, step_command


class LocalJob:
    """A child process, in a session of its own: Ctrl-C in the terminal reaches it through its runner alone, once."""

    id = ""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str], lock: int) -> None:
        with log.open("ab") as file:
            file.write(f"$ {' '.join(command)}\n".encode())
            file.flush()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, **environment},
                start_new_session=True,
                pass_fds=(lock,),
            )

    def poll(self) -> int | None:
        """See :class:`Job`."""
        return self._process.poll()

    def stop(self) -> None:
        """See :class:`Job`."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)


class LocalLauncher:
    """Runs up to ``parallel`` steps side by side.

    Args:
        parallel: how many.
        lock: file descriptor that every step inherits, see :func:`apv_fast.experiments.runner.folder_lock`.
    """

    def __init__(self, parallel: int, lock: int) -> None:
        self.slots, self._lock = parallel, lock
        self._jobs: list[LocalJob | None] = [None] * parallel

    def start(self, name: str, arguments: Sequence[str], log: Path) -> Job:
        """See :class:`apv_fast.experiments.runner.Launcher`."""
        slot = next(index for index, job in enumerate(self._jobs) if job is None or job.poll() is not None)
        job = LocalJob(step_command(arguments), log, self._environment(slot), self._lock)
        self._jobs[slot] = job
        return job

    def find(self, job: str) -> None:
        """None: the lock would have kept us out."""

    def _environment(self, slot: int) -> dict[str, str]:
        """An equal share of the cores, and a GPU of its own as far as there are enough."""
        cores = str(max(1, len(os.sched_getaffinity(0)) // self.slots))
        shares = {name: cores for name in ("OMP_NUM_THREADS", "LP_NUM_THREADS") if name not in os.environ}
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        if self.slots > 1 and "," in gpus:
            names = gpus.split(",")
            shares["CUDA_VISIBLE_DEVICES"] = names[slot % len(names)]
        return shares

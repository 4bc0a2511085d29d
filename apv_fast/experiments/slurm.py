"""Steps as jobs of a Slurm cluster, submitted by submitit; one job a step, so one a seed of an arm.

A job that Slurm preempts, or whose time is up, saves a checkpoint and queues itself again. The runner may end and come
back meanwhile: it finds its jobs by their numbers, which are in ``plan.json``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apv_fast.config import ConfigError, SlurmConfig
from apv_fast.experiments.runner import Job, step_command
from apv_fast.optional import optional

REQUEUES = 1000  # how often a job may run out of time; every time it goes on from its checkpoint


class StepFunction:
    """What a job runs: the step as a child process, which a warning from Slurm makes save and end."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self.arguments, self.log = tuple(arguments), log
        self._pid = 0

    def __call__(self) -> int:
        """Run the step; returns its exit status."""
        command = step_command(self.arguments)
        warning = os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")
        previous = signal.signal(signal.Signals[f"SIG{warning}"], signal.SIG_IGN)
        with self.log.open("ab") as file:  # the child ignores the warning, which Slurm sends to every process of a job
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        self._pid = child.pid
        signal.signal(signal.Signals[f"SIG{warning}"], previous)
        while (status := child.poll()) is None:
            time.sleep(0.2)
        return status

    def checkpoint(self) -> Any:
        """Called by submitit in the handler of the warning; returns what to submit again."""
        from submitit.helpers import DelayedSubmission

        if self._pid:
            os.kill(self._pid, signal.SIGTERM)
            os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)  # leaves the status to __call__
        return DelayedSubmission(StepFunction(self.arguments, self.log))


class SubmititJob:
    """A job of submitit."""

    def __init__(self, job: Any) -> None:
        self._job = job
        self.id = str(job.job_id)

    def poll(self) -> int | None:
        """See :class:`apv_fast.experiments.runner.Job`; 1 if it ended without a result, killed for instance."""
        from submitit.core.utils import FailedJobError, UncompletedJobError

        if not self._job.done():
            return None
        try:
            return int(self._job.result())
        except (FailedJobError, UncompletedJobError):
            return 1

    def stop(self) -> None:
        """See :class:`apv_fast.experiments.runner.Job`."""
        self._job.cancel(check=False)


class SlurmLauncher:
    """Submits steps; Slurm decides when they run.

    Args:
        folder: for submitit's files; all machines must see it.
        config: what a job asks Slurm for.
        parallel: most jobs at a time; None: no limit.

    Raises:
        ImportError: submitit is not installed.
        ConfigError: this is not a machine that can submit jobs.
    """

    def __init__(self, folder: Path, config: SlurmConfig, parallel: int | None = None) -> None:
        submitit = optional("submitit", "launcher 'slurm' needs", "slurm")
        self.slots = parallel or 2**31
        self._folder = folder
        try:
            self._executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=REQUEUES)
        except RuntimeError as error:
            raise ConfigError(f"launcher is 'slurm', but no job can be submitted here: {error}") from error
        self._executor.update_parameters(
            timeout_min=config.minutes,
            gpus_per_node=config.gpus,
            cpus_per_task=config.cpus,
            mem_gb=config.memory_gb,
            slurm_setup=[*config.setup, f"export OMP_NUM_THREADS={config.cpus}"],
            **{f"slurm_{name}": value for name in ("partition", "account", "qos") if (value := getattr(config, name))},
        )

    def start(self, name: str, arguments: Sequence[str], log: Path) -> Job:
        """See :class:`apv_fast.experiments.runner.Launcher`."""
        self._executor.update_parameters(name=f"apv-{name.replace('/', '-')}")
        return SubmititJob(self._executor.submit(StepFunction(arguments, log.resolve())))

    def find(self, job: str) -> Job | None:
        """See :class:`apv_fast.experiments.runner.Launcher`."""
        from submitit import SlurmJob

        return SubmititJob(SlurmJob(self._folder, job))

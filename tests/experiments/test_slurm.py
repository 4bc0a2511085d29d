"""Steps as jobs of Slurm, by submitit: a Slurm of shell scripts, and a warning before the time is up."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from apv_fast.config import ConfigError, SlurmConfig
from apv_fast.experiments import slurm
from apv_fast.experiments.runner import Job
from apv_fast.experiments.slurm import SlurmLauncher, StepFunction

pytest.importorskip("submitit")

# A Slurm of one machine: it runs what is submitted at once, and knows no queue.
SBATCH = """#!/bin/sh
cp "$1" "$FAKE_SLURM/submitted"
export SLURM_JOB_ID=71 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
setsid bash "$1" > "$FAKE_SLURM/output" 2>&1 &
echo Submitted batch job 71
"""
SRUN = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do case "$1" in --output|--error) shift;; esac; shift; done
exec "$@"
"""


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands of Slurm in the PATH; gives the folder with what was submitted."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "sacct": "#!/bin/sh\n", "scancel": "#!/bin/sh\n"}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path))
    return tmp_path


def _finish(job: Job | None, seconds: float = 60) -> int:
    assert job is not None
    deadline = time.monotonic() + seconds
    while (status := job.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return status


def test_a_step_runs_as_a_job_and_is_found_again(fake_slurm: Path) -> None:
    config = SlurmConfig(partition="gpu-long", gpus=2, cpus=3, memory_gb=20, minutes=90, setup=("module load cuda",))
    (fake_slurm / "bin" / "module").symlink_to("/bin/true")
    launcher = SlurmLauncher(fake_slurm / "jobs", config)
    log = fake_slurm / "step.log"
    job = launcher.start("finetune/reach/apv/seed-1", ("plot",), log)
    assert job.id == "71"
    submitted = (fake_slurm / "submitted").read_text()
    for line in ("--partition=gpu-long", "--gpus-per-node=2", "--cpus-per-task=3", "--mem=20GB", "--time=90"):
        assert f"#SBATCH {line}\n" in submitted
    assert "--job-name=apv-finetune-reach-apv-seed-1\n" in submitted
    assert "\nmodule load cuda\nexport OMP_NUM_THREADS=3\n" in submitted
    again = SlurmLauncher(fake_slurm / "jobs", config).find("71")
    assert again is not None and again.poll() is None, "it takes longer to start than that"
    assert _finish(job) == _finish(again) == 1
    assert (
        log.read_text()
        == "apv-fast plot: runs is empty; name at least one run directory, or the folder of an experiment\n"
    )


def test_without_slurm() -> None:
    with pytest.raises(ConfigError, match=r"launcher is 'slurm', but no job can be submitted here: .*srun"):
        SlurmLauncher(Path("jobs"), SlurmConfig())
    assert not Path("jobs").exists()


def test_without_submitit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ImportError, match=r"launcher 'slurm' needs submitit: pip install 'apv-fast\[slurm\]'"):
        SlurmLauncher(Path("jobs"), SlurmConfig())


CHILD = """
import signal, sys, time
from pathlib import Path
def stop(*_):
    time.sleep(0.3)  # it takes time to save
    Path(sys.argv[1], "saved").touch()
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
Path(sys.argv[1], "started").touch()
time.sleep(30)
"""


@pytest.fixture
def _usual_signals() -> Iterator[None]:
    previous = signal.getsignal(signal.SIGUSR2)
    yield
    signal.signal(signal.SIGUSR2, previous)


@pytest.mark.usefixtures("_usual_signals")
def test_a_warning_makes_the_step_save_before_it_is_queued_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "step_command", lambda arguments: [sys.executable, "-c", CHILD, *arguments])
    function = StepFunction((str(tmp_path),), tmp_path / "log")
    again: list[StepFunction] = []

    class Requeued(BaseException):
        pass

    def warned(number: int, frame: FrameType | None) -> None:  # as submitit's own handler does
        again.append(function.checkpoint().function)
        raise Requeued

    signal.signal(signal.SIGUSR2, warned)

    def warn() -> None:
        while not (tmp_path / "started").exists():
            time.sleep(0.02)
        for process in (function._pid, os.getpid()):  # Slurm warns every process of a job
            os.kill(process, signal.SIGUSR2)

    thread = threading.Thread(target=warn)
    thread.start()
    with pytest.raises(Requeued):
        function()
    thread.join()
    assert (tmp_path / "saved").exists(), "the step was not waited for"
    (next_time,) = again
    assert (next_time.arguments, next_time.log) == (function.arguments, function.log)

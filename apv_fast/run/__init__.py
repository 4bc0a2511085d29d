"""What a long job leaves on disk and shows while it runs; nothing here knows what is being trained."""

from apv_fast.run.checkpoint import (
    CheckpointError,
    check_state,
    latest_checkpoint,
    load_checkpoint,
    load_into,
    load_latest,
    restore_rng,
    rng_state,
    save_checkpoint,
)
from apv_fast.run.directory import RunDirectory, RunError
from apv_fast.run.gif import open_loop_grid, write_gif
from apv_fast.run.interrupt import StopRequest, stop_on_signal
from apv_fast.run.metrics import MeanMetrics, Metrics, read_metrics
from apv_fast.run.progress import Progress

__all__ = [
    "CheckpointError",
    "MeanMetrics",
    "Metrics",
    "Progress",
    "RunDirectory",
    "RunError",
    "StopRequest",
    "check_state",
    "latest_checkpoint",
    "load_checkpoint",
    "load_into",
    "load_latest",
    "open_loop_grid",
    "read_metrics",
    "restore_rng",
    "rng_state",
    "save_checkpoint",
    "stop_on_signal",
    "write_gif",
]

"""``apv-fast pretrain``: learn an action-free video model from any mixture of videos."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

from apv_fast.agent import Pretrainer
from apv_fast.agent.open_loop import CONTEXT, SEQUENCES, open_loop_video
from apv_fast.agent.validation import validation_loss
from apv_fast.commands.ingest import ingest
from apv_fast.commands.parts.device import computing, replay_place, to_device
from apv_fast.commands.parts.rendering_mismatch import warn_of_mixture
from apv_fast.commands.parts.training_run import begin, going_on, stopped
from apv_fast.config import IngestConfig, PretrainConfig, check, user_settings
from apv_fast.data import Prefetcher, VideoDataset, is_store, open_videos
from apv_fast.profile import annotate, annotated
from apv_fast.run import (
    MeanMetrics,
    Metrics,
    Progress,
    RunDirectory,
    StopRequest,
    load_latest,
    restore_rng,
    rng_state,
    save_checkpoint,
    stop_on_signal,
    write_gif,
)
from apv_fast.run.plot import plot_runs

VALIDATION_BATCHES = 4
WORTH_SAYING = 0.01  # share of the time that the trainer waits for data
SEED_OF_VIDEOS = 0  # what is imagined in open-loop videos: the same noise in every one


def pretrain(config: PretrainConfig) -> RunDirectory:
    """Run until ``config.steps`` updates are done.

    Raises:
        KeyboardInterrupt: the user stopped it; what was done is saved.
    """
    check(config)
    with computing(config.seed, config.device, config.backend) as device, ExitStack() as stack:
        with user_settings():
            dataset = make_dataset(config, device)
            warn_of_mixture(dataset.qualities)
            videos = stack.enter_context(Prefetcher(dataset, config.batch, config.prefetch))
            trainer = Pretrainer(config, device)
        run = begin(config, trainer, f"pretrain: {config.steps} updates, {dataset.description}")
        means = MeanMetrics()
        checkpoint = load_latest(run.checkpoints) if config.resume else None
        if checkpoint is not None:
            source, _, state = checkpoint
            trainer.restore(state["trainer"], source)
            if "videos" in state:  # else it was imported: weights only
                videos.load_state_dict(state["videos"])
                means.load_state_dict(state["means"])
                restore_rng(state["rng"])
            going_on(trainer.updates, config.steps)
        start = trainer.updates if config.resume else None
        with stop_on_signal() as stop, Metrics(run.path, resume_step=start) as metrics:
            _train(config, trainer, videos, run, means, metrics, stop)
    if trainer.updates < config.steps:
        raise stopped(run, "pretrain", trainer.updates, config.steps)
    return run


def make_dataset(config: PretrainConfig, device: torch.device) -> VideoDataset:
    """The videos: images and where sequences begin, never an action."""
    return open_videos(
        config.data,
        store_of=lambda path: _decoded(path, config),
        chunk_length=config.length,
        capacity_steps=config.capacity,
        prioritize_ends=config.prioritize_ends,
        validation=config.validation,
        seed=config.seed,
        **replay_place(config, device),
    )


def _decoded(path: Path, config: PretrainConfig) -> Path:
    """The store of raw videos: made now, or by an earlier start of the run, which need not have them any more."""
    digest = hashlib.blake2b(str(path.resolve()).encode(), digest_size=4).hexdigest()
    store = (config.cache or RunDirectory(config.out).data) / f"{path.resolve().name}-{digest}"
    if config.resume and is_store(store):
        return store
    return ingest(IngestConfig((path,), store))


def _train(
    config: PretrainConfig,
    trainer: Pretrainer,
    videos: Prefetcher,
    run: RunDirectory,
    means: MeanMetrics,
    metrics: Metrics,
    stop: StopRequest,
) -> None:
    text, last = "", False
    validates = videos.dataset.stats["held_out"] > 0
    with Progress("pretrain", config.steps, start=trainer.updates, unit="update") as progress:
        while trainer.updates < config.steps and not stop.requested:
            with annotate("replay_sample"):
                batch = videos.next()
            means.add(trainer.update(batch))
            step, last = trainer.updates, trainer.updates == config.steps
            if step % config.log_every == 0 or last:
                values = means.take() | {"data_wait": videos.take_wait()}
                metrics.scalars(step, values)
                text = _summary(values)
            if validates and (step % config.validate_every == 0 or last):
                with annotate("validation"):
                    fixed = videos.dataset.fixed(config.batch, VALIDATION_BATCHES)
                    metrics.scalars(step, validation_loss(trainer.model, fixed))
            if (step % config.video_every == 0 or last) and config.length > CONTEXT:
                _write_video(trainer, videos.dataset, run, metrics)
            if step % config.checkpoint_every == 0 and not last:
                _save(trainer, videos, run, means)
            progress.update(step, text)
    _save(trainer, videos, run, means)
    if last:
        also = ("val_image_loss",) if validates else ()
        plot_runs([run.path], run.plots / "image_loss.png", metric="image_loss", also=also, x="step")


def _summary(values: Mapping[str, float]) -> str:
    """What the progress line says beside the rate."""
    text = f"image loss {values['image_loss']:.1f}, KL {values['model_kl']:.2f}"
    return text + (f", {values['data_wait']:.0%} waiting for data" if values["data_wait"] > WORTH_SAYING else "")


def _write_video(trainer: Pretrainer, dataset: VideoDataset, run: RunDirectory, metrics: Metrics) -> None:
    """The open-loop report on fixed sequences, of held-out episodes if there are any."""
    for batch in dataset.fixed(SEQUENCES):
        device = next(trainer.model.parameters()).device
        noise = torch.tensor(SEED_OF_VIDEOS, device=device)
        frames = open_loop_video(trainer.model, to_device(batch, device), noise)
        write_gif(run.videos / f"open_loop_{trainer.updates:08d}.gif", frames, scale=2)
        metrics.video(trainer.updates, "open_loop", frames)


@annotated("checkpoint")
def _save(trainer: Pretrainer, videos: Prefetcher, run: RunDirectory, means: MeanMetrics) -> None:
    state = {
        "trainer": trainer.state_dict(),
        "videos": videos.state_dict(),
        "qualities": sorted(videos.dataset.qualities),
        "means": means.state_dict(),
        "rng": rng_state(),
    }
    save_checkpoint(run.checkpoints, trainer.updates, state)

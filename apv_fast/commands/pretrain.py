"""``apv-fast pretrain``: learn an action-free video model from folders of videos."""

from __future__ import annotations

import torch

from apv_fast.agent import Pretrainer
from apv_fast.agent.open_loop import CONTEXT, SEQUENCES, open_loop_video
from apv_fast.commands.common import MeanMetrics, begin, computing, to_device
from apv_fast.config import PretrainConfig
from apv_fast.data import VIDEO_KEYS, Replay
from apv_fast.run import (
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


def pretrain(config: PretrainConfig) -> RunDirectory:
    """Run until ``config.steps`` updates are done or the user interrupts; either way a checkpoint is left."""
    with computing(config.seed, config.device, config.backend) as device:
        replay = make_replay(config)
        run = begin(config)
        trainer = Pretrainer(config, device)
        resumed = load_latest(run.checkpoints, map_location=device) if config.resume else None
        if resumed is not None:
            source, _, state = resumed
            trainer.restore(state["trainer"], source)
            replay.load_state_dict(state["replay"])
            restore_rng(state["rng"])
        start = trainer.updates if config.resume else None
        with stop_on_signal() as stop, Metrics(run.path, resume_step=start) as metrics:
            _train(config, trainer, replay, run, metrics, stop, device)
        replay.close()
    return run


def make_replay(config: PretrainConfig) -> Replay:
    """The videos: images and where episodes begin, never an action."""
    return Replay(
        config.data,
        chunk_length=config.length,
        capacity_steps=config.capacity,
        prioritize_ends=config.prioritize_ends,
        keys=VIDEO_KEYS,
        seed=config.seed,
    )


def _train(
    config: PretrainConfig,
    trainer: Pretrainer,
    replay: Replay,
    run: RunDirectory,
    metrics: Metrics,
    stop: StopRequest,
    device: torch.device,
) -> None:
    means, text = MeanMetrics(), ""
    with Progress("pretrain", config.steps, start=trainer.updates, unit="update") as progress:
        while trainer.updates < config.steps and not stop.requested:
            means.add(trainer.update(to_device(replay.sample(config.batch), device)))
            step, last = trainer.updates, trainer.updates == config.steps
            if step % config.log_every == 0 or last:
                values = means.take()
                metrics.scalars(step, values)
                text = f"image loss {values['image_loss']:.1f}, KL {values['model_kl']:.2f}"
            if (step % config.video_every == 0 or last) and config.length > CONTEXT:
                batch = to_device(replay.sample(SEQUENCES), device)
                frames = open_loop_video(trainer.model, batch)
                write_gif(run.videos / f"open_loop_{step:08d}.gif", frames, scale=2)
                metrics.video(step, "open_loop", frames)
            if step % config.checkpoint_every == 0 and not last:
                _save(trainer, replay, run)
            progress.update(step, text)
    _save(trainer, replay, run)


def _save(trainer: Pretrainer, replay: Replay, run: RunDirectory) -> None:
    state = {"trainer": trainer.state_dict(), "replay": replay.state_dict(), "rng": rng_state()}
    save_checkpoint(run.checkpoints, trainer.updates, state)

"""``apv-fast pretrain``: learn an action-free video model from folders of videos."""

from __future__ import annotations

from contextlib import ExitStack, closing

import torch

from apv_fast.agent import Pretrainer
from apv_fast.agent.open_loop import CONTEXT, SEQUENCES, open_loop_video
from apv_fast.commands.common import (
    MeanMetrics,
    begin,
    computing,
    going_on,
    replay_place,
    stopped,
    to_device,
    user_settings,
)
from apv_fast.config import PretrainConfig, check
from apv_fast.data import VIDEO_KEYS, Replay
from apv_fast.profile import annotate, annotated
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
from apv_fast.run.plot import plot_runs


def pretrain(config: PretrainConfig) -> RunDirectory:
    """Run until ``config.steps`` updates are done.

    Raises:
        KeyboardInterrupt: the user stopped it; what was done is saved.
    """
    check(config)
    with computing(config.seed, config.device, config.backend) as device, ExitStack() as stack:
        replay = stack.enter_context(closing(make_replay(config, device)))
        with user_settings():
            trainer = Pretrainer(config, device)
        run = begin(
            config,
            trainer,
            f"pretrain: {config.steps} updates, {replay.stats['episodes']} episodes {replay.description}",
        )
        means = MeanMetrics()
        found = load_latest(run.checkpoints) if config.resume else None
        if found is not None:
            source, _, state = found
            trainer.restore(state["trainer"], source)
            if "replay" in state:  # else it was imported: weights only
                replay.load_state_dict(state["replay"])
                means.load_state_dict(state["means"])
                restore_rng(state["rng"])
            going_on(trainer.updates, config.steps)
        start = trainer.updates if config.resume else None
        with stop_on_signal() as stop, Metrics(run.path, resume_step=start) as metrics:
            _train(config, trainer, replay, run, means, metrics, stop, device)
    if trainer.updates < config.steps:
        raise stopped(run, "pretrain", trainer.updates, config.steps)
    return run


def make_replay(config: PretrainConfig, device: torch.device) -> Replay:
    """The videos: images and where episodes begin, never an action."""
    return Replay(
        config.data,
        chunk_length=config.length,
        capacity_steps=config.capacity,
        prioritize_ends=config.prioritize_ends,
        keys=VIDEO_KEYS,
        seed=config.seed,
        **replay_place(config, device),
    )


def _train(
    config: PretrainConfig,
    trainer: Pretrainer,
    replay: Replay,
    run: RunDirectory,
    means: MeanMetrics,
    metrics: Metrics,
    stop: StopRequest,
    device: torch.device,
) -> None:
    text, last = "", False
    with Progress("pretrain", config.steps, start=trainer.updates, unit="update") as progress:
        while trainer.updates < config.steps and not stop.requested:
            with annotate("replay_sample"):
                drawn = replay.sample(config.batch)
            means.add(trainer.update(drawn))
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
                _save(trainer, replay, run, means)
            progress.update(step, text)
    _save(trainer, replay, run, means)
    if last:
        plot_runs([run.path], run.plots / "image_loss.png", metric="image_loss", x="step")


@annotated("checkpoint")
def _save(trainer: Pretrainer, replay: Replay, run: RunDirectory, means: MeanMetrics) -> None:
    state = {"trainer": trainer.state_dict(), "replay": replay.state_dict(), "rng": rng_state()}
    state["means"] = means.state_dict()
    save_checkpoint(run.checkpoints, trainer.updates, state)

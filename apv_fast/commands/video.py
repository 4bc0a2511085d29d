"""``apv-fast video``: what a model imagines, beside what happened."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from apv_fast.agent import Pretrainer, VideoModel, WorldModel
from apv_fast.agent.open_loop import CONTEXT, SEQUENCES, open_loop_video
from apv_fast.commands.parts.device import computing, to_device
from apv_fast.commands.parts.training_run import checkpoint_of, load_agent
from apv_fast.commands.pretrain import make_dataset
from apv_fast.config import ConfigError, FinetuneConfig, PretrainConfig, VideoConfig, from_dict, user_settings
from apv_fast.data import Replay
from apv_fast.run import RunDirectory, write_gif


def video(config: VideoConfig) -> Path:
    """Write the open-loop report of a run's newest checkpoint; returns the file."""
    run = RunDirectory.open(config.run)
    with computing(config.seed, config.device, config.backend) as device:
        model, trained, step = _load(run, device)
        if trained.length <= CONTEXT:
            raise ConfigError(f"{run.config_file}: length is {trained.length}; a video needs more than {CONTEXT} steps")
        batch = _sequences(config, trained, run)
        frames = open_loop_video(model, to_device(batch, device))
    out = config.out or run.videos / f"open_loop_{step:08d}.gif"
    write_gif(out, frames, scale=2)
    print(f"truth, model and error of {SEQUENCES} sequences, {CONTEXT} frames of context: {out}")
    return out


def _sequences(config: VideoConfig, trained: FinetuneConfig | PretrainConfig, run: RunDirectory) -> dict[str, Tensor]:
    """What to show: of what a video model was not trained on, if there is anything."""
    if isinstance(trained, FinetuneConfig):
        folders = config.data or (run.train_episodes,)
        with closing(Replay(folders, chunk_length=trained.length, seed=config.seed)) as replay:
            return replay.sample(SEQUENCES)
    if not (config.data or trained.data):
        raise ConfigError(f"data: {run.path} knows no videos, it was imported without; give some with --data")
    if config.data:
        trained = replace(trained, data=config.data, validation=0.0)
    with (
        user_settings(),
        closing(make_dataset(replace(trained, out=run.path, resume=True), torch.device("cpu"))) as dataset,
    ):
        for batch in dataset.fixed(SEQUENCES, seed=config.seed):
            return batch
    raise ConfigError("data: the run learnt from a stream, which has nothing to show; name videos with --data")


def _load(
    run: RunDirectory, device: torch.device
) -> tuple[VideoModel | WorldModel, FinetuneConfig | PretrainConfig, int]:
    """Model, configuration and step of a run."""
    if "env" in run.config():
        agent, config, step = load_agent(run.path, device)
        return agent.model, config, step
    pretrain_config = from_dict(PretrainConfig, run.config(), run.config_file)
    trainer = Pretrainer(pretrain_config, device)
    source, step, state = checkpoint_of(run, device)
    trainer.restore(state["trainer"], source)
    return trainer.model, pretrain_config, step

"""``apv-fast video``: what a model imagines, beside what happened."""

from __future__ import annotations

from pathlib import Path

import torch

from apv_fast.agent import Pretrainer, VideoModel, WorldModel
from apv_fast.agent.open_loop import CONTEXT, SEQUENCES, open_loop_video
from apv_fast.commands.common import checkpoint_of, computing, to_device
from apv_fast.commands.evaluate import load_agent
from apv_fast.config import ConfigError, PretrainConfig, VideoConfig, from_dict
from apv_fast.data import EPISODE_KEYS, VIDEO_KEYS, Replay
from apv_fast.run import RunDirectory, write_gif


def video(config: VideoConfig) -> Path:
    """Write the open-loop report of a run's newest checkpoint; returns the file."""
    run = RunDirectory.open(config.run)
    with computing(config.seed, config.device, config.backend) as device:
        model, length, folders, step = _load(run, device)
        if length <= CONTEXT:
            raise ConfigError(f"{run.config_file}: length is {length}; a video needs more than {CONTEXT} steps")
        if not (config.data or folders):
            raise ConfigError(f"data: {run.path} knows no videos, it was imported without; give some with --data")
        keys = EPISODE_KEYS if isinstance(model, WorldModel) else VIDEO_KEYS
        replay = Replay(config.data or folders, chunk_length=length, keys=keys, seed=config.seed)
        frames = open_loop_video(model, to_device(replay.sample(SEQUENCES), device))
        replay.close()
    out = config.out or run.videos / f"open_loop_{step:08d}.gif"
    write_gif(out, frames, scale=2)
    print(f"truth, model and error of {SEQUENCES} sequences, {CONTEXT} frames of context: {out}")
    return out


def _load(run: RunDirectory, device: torch.device) -> tuple[VideoModel | WorldModel, int, tuple[Path, ...], int]:
    """Model, chunk length, folders of episodes and step of a run."""
    if "env" in run.config():
        agent, config, step = load_agent(run.path, device)
        return agent.model, config.length, (run.train_episodes,), step
    pretrain_config = from_dict(PretrainConfig, run.config(), run.config_file)
    trainer = Pretrainer(pretrain_config, device)
    source, step, state = checkpoint_of(run, device)
    trainer.restore(state["trainer"], source)
    return trainer.model, pretrain_config.length, pretrain_config.data, step

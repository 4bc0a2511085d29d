"""``apv-fast import-official``: a run directory from what the official implementation's pre-training left."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import torch

from apv_fast.agent import Pretrainer
from apv_fast.config import ConfigError, ImportConfig, ModelConfig, PretrainConfig, check, from_dict, to_dict
from apv_fast.data.episode_folders import episode_files, episode_folder
from apv_fast.official import read_model, read_settings
from apv_fast.official.settings import SETTINGS
from apv_fast.run import RunDirectory, load_into, save_checkpoint


def import_official(config: ImportConfig) -> RunDirectory:
    """Write the run directory; the official files stay where and as they are.

    Episodes are referred to by their absolute path, neither copied nor linked: there can be a hundred gigabytes of
    them, nothing is ever written to them, and commands that need them say which folder is gone if it was moved.

    Raises:
        CheckpointError: the weights are not those of an official video model.
        ConfigError: a setting is missing, or contradicts the files.
        RunError: the run directory has something in it.
    """
    settings = read_settings(config.folder)
    discrete = config.discrete if config.discrete is not None else settings.get("model", {}).get("discrete")
    model = read_model(config.folder, discrete)
    data = _episodes(config)
    values: dict[str, Any] = settings | {"model": dataclasses.asdict(model.sizes)}
    values |= {"data": [str(folder) for folder in data], "out": str(config.out)}
    run_config = from_dict(PretrainConfig, values, config.folder / SETTINGS)
    check(run_config)
    trainer = Pretrainer(run_config, torch.device("cpu"))
    load_into(trainer.model, model.state, source=config.folder, field="model")
    run = RunDirectory.create(config.out, to_dict(run_config))
    save_checkpoint(run.checkpoints, 0, {"trainer": trainer.state_dict()})
    _report(run, run_config, model.sizes)
    return run


def _episodes(config: ImportConfig) -> tuple[Path, ...]:
    """The folder of the model's videos, absolute, if there is one with episodes."""
    folder = config.data or config.folder / "train_episodes"
    if config.data is None and not folder.is_dir():
        return ()
    episodes = episode_files([episode_folder(folder)])
    if config.data is not None and not episodes:
        raise ConfigError(f"data: {folder} has no episodes; leave --data out to import only the weights")
    return (folder.resolve(),) if episodes else ()


def _report(run: RunDirectory, config: PretrainConfig, sizes: ModelConfig) -> None:
    """Say what was found and what to do next."""
    latents = f"{sizes.stoch} × {sizes.discrete} classes" if sizes.discrete else f"{sizes.stoch} Gaussian"
    print(f"deter {sizes.deter}, hidden {sizes.hidden}, latents {latents}, CNN depth {sizes.cnn_depth}: {run.path}")
    if config.data:
        print(f"episodes: {len(episode_files([episode_folder(config.data[0])]))} in {config.data[0]}, left there")
    else:
        print("episodes: none; apv-fast video needs some: --data FOLDER")
    default = dataclasses.asdict(ModelConfig())
    flags = [
        f"--model.{name.replace('_', '-')} {value}"
        for name, value in dataclasses.asdict(sizes).items()
        if value != default[name]
    ]
    print("next: apv-fast finetune --env ID --pretrained", shlex.quote(str(run.path)), "--out RUN", *flags)

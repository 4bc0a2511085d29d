"""``apv-fast export``: a run's modules as safetensors and JSON, for other programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from apv_fast.agent import Pretrainer
from apv_fast.commands.parts.training_run import checkpoint_of, load_agent
from apv_fast.config import ExportConfig, PretrainConfig, from_dict
from apv_fast.data import atomic_file
from apv_fast.nn.saving import Savable
from apv_fast.run import RunDirectory, RunError


def export(config: ExportConfig) -> Path:
    """Write each module of a run's newest checkpoint to a folder of its own, and the run's configuration.

    ``apv_fast.nn.Encoder.from_pretrained(out / "encoder")`` reads one back; so for ``rssm``, ``decoder`` and the
    others. Moments of the optimisers, clocks and running magnitudes stay behind: the run itself has those.

    Raises:
        RunError: the run has no checkpoint yet, or ``out`` has something in it.
    """
    run = RunDirectory.open(config.run)
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise RunError(f"out: {config.out} exists and is not empty; choose another --out")
    modules = list(_modules(run))
    for name, module in modules:
        module.save_pretrained(config.out / name)
    with atomic_file(config.out / "config.json") as file:
        file.write((json.dumps(run.config(), indent=2) + "\n").encode())
    print(f"{', '.join(name for name, _ in modules)}: {config.out}")
    return config.out


def _modules(run: RunDirectory) -> Iterator[tuple[str, Savable]]:
    """The parts of the model, and of the policy if there is one."""
    device = torch.device("cpu")
    owners: list[nn.Module]
    if "env" in run.config():
        agent, _, _ = load_agent(run.path, device)
        owners = [agent.model, agent.behavior]
    else:
        trainer = Pretrainer(from_dict(PretrainConfig, run.config(), run.config_file), device)
        source, _, state = checkpoint_of(run, device)
        trainer.restore(state["trainer"], source)
        owners = [trainer.model]
    for owner in owners:
        for name, module in owner.named_children():
            if isinstance(module, Savable):
                yield name, module

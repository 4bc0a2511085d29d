"""The ``apv-fast`` command line: a command, perhaps a preset, and any field of its configuration."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from apv_fast import config as configs
from apv_fast.backend import BackendError
from apv_fast.data import DiskError, EpisodeError
from apv_fast.experiments.plan import PlanError
from apv_fast.run import CheckpointError, RunDirectory, RunError

DEFAULT_PRESET = "dmc"


@dataclass(frozen=True)
class Command:
    """One command: what configures it, what runs it."""

    config: type
    runner: str  # "module:function", imported when it runs
    preset: bool = False  # has defaults in the presets
    required: tuple[str, ...] = ()  # fields that a preset cannot know


_COMMANDS = "apv_fast.commands."
COMMANDS: dict[str, Command] = {
    "collect": Command(configs.CollectConfig, _COMMANDS + "collect:collect", True, ("env", "out")),
    "ingest": Command(configs.IngestConfig, _COMMANDS + "ingest:ingest"),
    "shards": Command(configs.ShardsConfig, _COMMANDS + "shards:shards"),
    "pretrain": Command(configs.PretrainConfig, _COMMANDS + "pretrain:pretrain", True, ("data", "out")),
    "finetune": Command(configs.FinetuneConfig, _COMMANDS + "finetune:finetune", True, ("env", "out")),
    "evaluate": Command(configs.EvaluateConfig, _COMMANDS + "evaluate:evaluate_run"),
    "video": Command(configs.VideoConfig, _COMMANDS + "video:video"),
    "import-official": Command(configs.ImportConfig, _COMMANDS + "import_official:import_official"),
    "export": Command(configs.ExportConfig, _COMMANDS + "export:export"),
    "plot": Command(configs.PlotConfig, _COMMANDS + "plot:plot"),
    "experiment": Command(configs.ExperimentConfig, _COMMANDS + "experiment:experiment"),
    "info": Command(configs.InfoConfig, _COMMANDS + "info:info"),
    "demo": Command(configs.DemoConfig, _COMMANDS + "demo:demo"),
}

# What a user can mend; anything else is our fault and keeps its traceback.
USER_ERRORS = (
    configs.ConfigError,
    BackendError,
    RunError,
    CheckpointError,
    PlanError,
    EpisodeError,
    DiskError,
    ImportError,
    MemoryError,
    OSError,
)


def overview() -> str:
    """What ``apv-fast --help`` prints."""
    lines = ["usage: apv-fast COMMAND [--preset NAME] [FIELDS]", ""]
    lines += [f"  {name:15} {(command.config.__doc__ or '').partition('. ')[0]}" for name, command in COMMANDS.items()]
    lines += [
        "",
        f"presets of collect, pretrain and finetune: {', '.join(configs.PRESETS)} (default: {DEFAULT_PRESET})",
    ]
    return "\n".join([*lines, "apv-fast COMMAND --help shows every field, its default and what it means"])


def parse(name: str, arguments: Sequence[str]) -> Any:
    """The configuration of command ``name`` from its command line.

    Raises:
        SystemExit: help was asked for, or an argument is wrong.
    """
    command = COMMANDS[name]
    if not command.preset:
        return _tyro(name, command, None, arguments)
    early = argparse.ArgumentParser(prog=f"apv-fast {name}", add_help=False, allow_abbrev=False)
    early.add_argument("--preset", choices=sorted(configs.PRESETS), default=DEFAULT_PRESET)
    chosen, rest = early.parse_known_args(arguments)
    default = _saved(command, rest)
    if default is None:
        default = getattr(configs.PRESETS[chosen.preset], name)
        # To show what there is, nothing has to be chosen.
        listing = command.config is configs.CollectConfig and "--list" in rest
        unknown = {"env": ""} if listing else dict.fromkeys(command.required, tyro.MISSING)
        default = dataclasses.replace(default, **unknown)
    config = _tyro(name, command, default, rest)
    if isinstance(config, configs.FinetuneConfig) and not config.resume and "--stacked" not in rest:
        # From scratch and with no bonus there is nothing that an action-free RSSM would do: plain DreamerV2.
        config = dataclasses.replace(config, stacked=config.stacked and (config.pretrained is not None or config.bonus))
    return config


def _saved(command: Command, arguments: Sequence[str]) -> Any:
    """With ``--resume``, the configuration that the run in ``--out`` was started with."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--resume", action="store_true")
    early.add_argument("--out", type=Path)
    chosen, _ = early.parse_known_args(arguments)
    if not chosen.resume or chosen.out is None:
        return None
    run = RunDirectory.open(chosen.out)
    return configs.from_dict(command.config, run.config(), run.config_file)


def _tyro(name: str, command: Command, default: Any, arguments: Sequence[str]) -> Any:
    description = command.config.__doc__ or ""
    if command.preset:
        description += f"\n\n--preset {{{','.join(configs.PRESETS)}}} sets the defaults (default: {DEFAULT_PRESET})."
    extra = {} if default is None else {"default": default}
    return tyro.cli(
        command.config,
        prog=f"apv-fast {name}",
        description=description,
        args=list(arguments),
        config=() if command.preset else (tyro.conf.PositionalRequiredArgs,),
        **extra,
    )


def run(name: str, config: Any) -> Any:
    """Run command ``name``."""
    module, _, function = COMMANDS[name].runner.partition(":")
    runner: Callable[[Any], Any] = getattr(importlib.import_module(module), function)
    return runner(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 if the command failed, 2 for a wrong command line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"apv-fast: unknown command {name!r}; the commands are: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"apv-fast {name}: warning: {message}", file=sys.stderr)
        try:
            result = run(name, parse(name, rest))
        except USER_ERRORS as error:
            print(f"apv-fast {name}: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt as interrupt:
            print(f"apv-fast {name}: {str(interrupt) or 'interrupted'}", file=sys.stderr)
            return 130
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())

"""``apv-fast experiment``: one of the paper's setups, from videos to learning curves."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TypeVar

from apv_fast.config import ConfigError, ExperimentConfig, user_settings
from apv_fast.experiments.local import LocalLauncher
from apv_fast.experiments.plan import Plan, load_plan
from apv_fast.experiments.runner import Launcher, Runner, folder_lock, log_file
from apv_fast.experiments.setups import ARMS, EXPERIMENTS, Experiment, make_plan
from apv_fast.experiments.sizes import Size
from apv_fast.experiments.slurm import SlurmLauncher

Value = TypeVar("Value", str, int)


def experiment(config: ExperimentConfig) -> int:
    """Run it, or show what would be run; returns the exit status: 1 if a step failed.

    Raises:
        ConfigError: there is no such experiment, size, task or arm.
        PlanError: the folder has steps of other settings, or another process runs them.
        KeyboardInterrupt: the user stopped it; what was done is saved.
    """
    if config.list:
        print(overview())
        return 0
    with user_settings():
        plan = planned(config)
        if config.dry_run:
            if before := load_plan(plan.out):
                plan.go_on_from(before)
            print(described(plan))
            return 0
        return _run(config, plan)


def planned(config: ExperimentConfig) -> Plan:
    """The plan that ``config`` asks for, as if nothing had been done."""
    if len(config.name) != 1:
        raise ConfigError(f"name: give one experiment, of {', '.join(EXPERIMENTS)}; --list describes them")
    (name,) = config.name
    if name not in EXPERIMENTS:
        raise ConfigError(f"name is {name!r}; the experiments are: {', '.join(EXPERIMENTS)}")
    chosen = EXPERIMENTS[name]
    size = config.size or next(iter(chosen.sizes))
    if size not in chosen.sizes:
        raise ConfigError(f"size is {size!r}; {name} has: {', '.join(chosen.sizes)}")
    if config.parallel is not None and config.parallel < 1:
        raise ConfigError(f"parallel is {config.parallel}; it must be at least 1")
    return make_plan(
        name,
        size,
        config.out or Path("runs") / f"{name}-{size}",
        tasks=_chosen("tasks", config.tasks, chosen.tasks, chosen.tasks[: chosen.sizes[size].targets]),
        arms=_chosen("arms", config.arms, ARMS, chosen.arms),
        seeds=_chosen("seeds", config.seeds, range(2**32), chosen.sizes[size].seeds),
        pretrained=config.pretrained,
        precision=config.precision,
    )


def _chosen(field: str, chosen: Sequence[Value], known: Collection[Value], default: Sequence[Value]) -> list[Value]:
    for one in chosen:
        if one not in known:
            names = known if isinstance(known, range) else ", ".join(map(str, known))
            raise ConfigError(f"{field} has {one!r}; it must be of: {names}")
    return list(dict.fromkeys(chosen or default))


def overview() -> str:
    """What ``--list`` prints."""
    lines = ["experiments (apv-fast experiment NAME):"]
    for name, one in EXPERIMENTS.items():
        lines += [f"  {name}: {one.description}", f"      sizes {', '.join(map(_size, [one] * 9, one.sizes))}"]
        lines += [f"      tasks {', '.join(one.tasks)}; by default the arms {', '.join(one.arms)}"]
    lines += ["", "arms (--arms):", *(f"  {name:15} {arm.description}" for name, arm in ARMS.items())]
    return "\n".join(lines)


def _size(one: Experiment, size: Size) -> str:
    seeds = len(one.sizes[size].seeds)
    return f"{size} ({seeds} seed{'s' * (seeds > 1)})"


def described(plan: Plan) -> str:
    """The plan as text: a line a step, the exact command below."""
    lines = [f"{plan.experiment} at size {plan.size} into {plan.out}: {len(plan.steps)} steps"]
    for step in plan.steps:
        needs = f" after {step.needs[0]}" if len(step.needs) == 1 else f" after {len(step.needs)} steps"
        lines += ["", f"[{step.state}] {step.name}{needs if step.needs else ''} -> {plan.out / step.writes}"]
        lines += [f"    {plan.command_line(step)}"]
    return "\n".join(lines)


def _run(config: ExperimentConfig, plan: Plan) -> int:
    with folder_lock(plan.out) as lock:
        if before := load_plan(plan.out):
            plan.go_on_from(before)
        plan.save()
        launcher: Launcher
        if config.launcher == "slurm":
            launcher = SlurmLauncher(plan.out / "slurm", config.slurm, config.parallel)
        else:
            launcher = LocalLauncher(config.parallel or 1, lock)
        Runner(plan, launcher).run()
    failed = [step for step in plan.steps if step.state == "failed"]
    for step in failed:
        print(f"{step.name} failed; its output is in {log_file(plan, step)}")
    done = sum(step.state == "done" for step in plan.steps)
    if not failed and done < len(plan.steps):
        raise KeyboardInterrupt(f"stopped with {done} of {len(plan.steps)} steps done; the same command goes on")
    if failed:
        print(f"{done} of {len(plan.steps)} steps are done; the same command tries the others again")
        return 1
    print(f"all {done} steps are done: {plan.out / 'curves.png'}, {plan.out / 'curves.json'}")
    return 0

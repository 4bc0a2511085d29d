"""``apv-fast demo``: the whole of APV on two small tasks, from videos to a policy, with pictures.

Videos of a walker that takes random actions teach a model what a walker looks like and how it moves. The task that is
then learnt is another one of the same body: to stand up and stay up. The learning rates are higher than the paper's,
since there is time for a few hundred updates only.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

from apv_fast.commands.collect import collect
from apv_fast.commands.evaluate import evaluate_run
from apv_fast.commands.finetune import finetune
from apv_fast.commands.pretrain import pretrain
from apv_fast.config import (
    PRESETS,
    BehaviorConfig,
    DemoConfig,
    EvaluateConfig,
    ModelConfig,
    OptimizerConfig,
    WorldConfig,
)
from apv_fast.run import RunDirectory, RunError, read_metrics
from apv_fast.run.plot import plot_runs

VIDEO_TASK, TASK = "dmc:walker-walk", "dmc:walker-stand"
WORLD = WorldConfig(action_repeat=4, quality="fast")
MODEL = ModelConfig(deter=128, hidden=128, stoch=12, discrete=12, cnn_depth=8)
MARGIN = 1.5  # what "clearly above random" means: the final return is at least this many times the random policy's


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    videos: int
    pretrain_updates: int
    steps: int
    prefill: int
    first_updates: int
    eval_every: int
    episodes: int  # of the final evaluation


FULL = Scale(
    videos=20, pretrain_updates=800, steps=16_000, prefill=1000, first_updates=100, eval_every=2000, episodes=10
)
QUICK = Scale(videos=2, pretrain_updates=20, steps=300, prefill=250, first_updates=5, eval_every=1000, episodes=2)


def demo(config: DemoConfig) -> int:
    """Run everything; returns the exit status: 1 if the policy did not learn (never with ``quick``)."""
    scale = QUICK if config.quick else FULL
    started = time.monotonic()
    minutes = "under 2 minutes" if config.quick else "about 7 minutes on 2 CPU cores with AVX-512"
    print(f"APV on {TASK}, pre-trained on videos of {VIDEO_TASK}. This takes {minutes}.")
    _clear(config.out)
    print(f"\n1/4  videos: {scale.videos} episodes of {VIDEO_TASK} with random actions")
    collect(
        replace(
            PRESETS["small"].collect,
            env=VIDEO_TASK,
            out=config.out / "videos",
            episodes=scale.videos,
            world=WORLD,
            seed=config.seed,
        )
    )
    print(f"\n2/4  pre-training on the videos, without actions: {scale.pretrain_updates} updates")
    pretrained = _pretrain(config, scale)
    print(f"\n3/4  fine-tuning on {TASK}: {scale.steps} agent steps, the first {scale.prefill} random")
    run = _finetune(config, scale, pretrained)
    print(f"\n4/4  evaluation: {scale.episodes} episodes each")
    return _conclude(config, scale, run, pretrained, started)


def _clear(out: Path) -> None:
    """Remove an earlier demo, and nothing but a demo."""
    marker = out / "demo"
    if out.exists() and any(out.iterdir()):
        if not marker.exists():
            raise RunError(f"{out} is not empty and was not made by apv-fast demo; choose another directory with --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    marker.touch()


def _pretrain(config: DemoConfig, scale: Scale) -> RunDirectory:
    return pretrain(
        replace(
            PRESETS["small"].pretrain,
            data=(config.out / "videos",),
            out=config.out / "pretrain",
            steps=scale.pretrain_updates,
            batch=16,
            length=16,
            model=replace(MODEL, precision=config.precision),
            optimizer=OptimizerConfig(lr=1e-3),
            log_every=50,
            seed=config.seed,
        )
    )


def _finetune(config: DemoConfig, scale: Scale, pretrained: RunDirectory) -> RunDirectory:
    return finetune(
        replace(
            PRESETS["small"].finetune,
            env=TASK,
            out=config.out / "finetune",
            pretrained=pretrained.path,
            steps=scale.steps,
            prefill=scale.prefill,
            batch=16,
            length=16,
            world=WORLD,
            model=replace(MODEL, precision=config.precision),
            optimizer=OptimizerConfig(lr=1e-3),
            behavior=BehaviorConfig(units=128, horizon=10, slow_every=30, optimizer=OptimizerConfig(lr=5e-4)),
            train_every=4,
            first_updates=scale.first_updates,
            eval_every=scale.eval_every,
            eval_episodes=2,
            log_every=500,
            seed=config.seed,
        )
    )


def _conclude(config: DemoConfig, scale: Scale, run: RunDirectory, pretrained: RunDirectory, started: float) -> int:
    result = evaluate_run(EvaluateConfig(run.path, episodes=scale.episodes, seed=config.seed + 1))
    curve = plot_runs([run.path], config.out / "curve.png")
    before = next(line["eval_return"] for line in read_metrics(run.metrics_file) if "eval_return" in line)
    random, after = result["random_return"], result["eval_return"]
    print(f"\nlearning curve     {curve}")
    print(f"prediction videos  {_newest(pretrained.videos)} (pre-trained)")
    print(f"                   {_newest(run.videos, 'open_loop')} (fine-tuned)")
    print(f"the policy         {_newest(run.videos, 'eval')}")
    print(f"run directory      {run.path}  (tensorboard --logdir {config.out})")
    print(f"took               {(time.monotonic() - started) / 60:.1f} minutes")
    print(f"\nreturn on {TASK}: random {random:.0f}, before training the policy {before:.0f}, after {after:.0f}")
    if config.quick:
        return 0
    if after < MARGIN * random:
        print(f"LEARNING FAILED: the final return is below {MARGIN} times the random policy's")
        return 1
    return 0


def _newest(folder: Path, prefix: str = "") -> Path:
    return max(folder.glob(f"{prefix}*.gif"))

"""What each experiment consists of: videos, pre-training on them, and every arm on every task and seed.

Arms differ in options of ``apv-fast finetune`` and in nothing else. One pre-trained model serves all tasks and seeds of
an experiment, as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from apv_fast.envs import list_tasks
from apv_fast.experiments.plan import OUT, Curve, Plan, Step
from apv_fast.experiments.sizes import LOCOMOTION, MANIPULATION, WALKER, Flags, Scale, Size


@dataclass(frozen=True)
class Arm:
    """One way to learn a task, compared with the others."""

    pretrained: bool
    options: tuple[str, ...]
    """Of ``finetune``."""
    description: str


ARMS: dict[str, Arm] = {
    "apv": Arm(True, (), "pre-trained on the videos, stacked, with the video bonus"),
    "dreamerv2": Arm(False, ("--no-stacked", "--no-bonus"), "DreamerV2 from scratch"),
    "no-stacking": Arm(True, ("--no-stacked",), "APV, with the actions put into the pre-trained RSSM itself"),
    "no-bonus": Arm(True, ("--no-bonus",), "APV without the video bonus"),
    "no-pretraining": Arm(False, ("--stacked",), "APV's model and bonus, from scratch"),
}

MANIPULATION_TASKS = ("lever-pull", "drawer-open", "door-lock", "button-press-topdown-wall", "reach", "dial-turn")
LOCOMOTION_TASKS = ("quadruped-walk", "quadruped-run", "hopper-hop")
CAMERAS = ("corner", "corner2", "corner3", "topview", "behindGripper")  # five views, as the paper's videos have


@dataclass(frozen=True)
class Experiment:
    """A named setup."""

    description: str
    videos: Literal["manipulation", "triped", "walker"]
    suite: str
    tasks: tuple[str, ...]
    preset: str
    metric: str
    sizes: dict[Size, Scale]
    arms: tuple[str, ...] = tuple(ARMS)


EXPERIMENTS: dict[str, Experiment] = {
    "manipulation": Experiment(
        "videos of Meta-world's experts in 44 tasks, five cameras -> the paper's six other Meta-world tasks",
        *("manipulation", "metaworld", MANIPULATION_TASKS, "metaworld", "eval_success", MANIPULATION),
    ),
    "locomotion-in-domain": Experiment(
        "videos of a Triped that learns to walk -> quadruped walk and run, hopper hop",
        *("triped", "dmc", LOCOMOTION_TASKS, "dmc", "eval_return", LOCOMOTION),
    ),
    "locomotion-from-manipulation": Experiment(
        "the videos of manipulation -> quadruped walk and run, hopper hop",
        *("manipulation", "dmc", LOCOMOTION_TASKS, "dmc", "eval_return", LOCOMOTION),
    ),
    "walker": Experiment(
        "videos of a walker's random actions -> walker-stand: small enough for two CPU cores and an hour",
        *("walker", "dmc", ("walker-stand",), "small", "eval_return", WALKER, ("apv", "dreamerv2", "no-pretraining")),
    ),
}


def make_plan(
    name: str,
    size: Size,
    out: Path,
    *,
    tasks: Sequence[str],
    arms: Sequence[str],
    seeds: Sequence[int],
    pretrained: Path | None = None,
    precision: str = "fp32",
) -> Plan:
    """The steps of one experiment.

    Args:
        name: of :data:`EXPERIMENTS`.
        size: one that the experiment has.
        out: folder for all of it.
        tasks: targets, without their suite.
        arms: of :data:`ARMS`.
        seeds: of the fine-tuning runs.
        pretrained: a run of ``apv-fast pretrain`` to use instead of making videos and pre-training on them.
        precision: of the products, in pre-training and fine-tuning.
    """
    experiment = EXPERIMENTS[name]
    scale = experiment.sizes[size]
    plan = Plan(name, size, out, experiment.metric)
    model = str(pretrained)
    needs: tuple[str, ...] = ()
    if pretrained is None and any(ARMS[arm].pretrained for arm in arms):
        plan.steps += _pretraining(experiment, scale, precision)
        last = plan.steps[-1]
        model, needs = f"{OUT}/{last.writes}", (last.name,)
    for task in tasks:
        for seed in seeds:  # seeds before arms: whatever is done first can be compared
            for arm in arms:
                curve = Curve(f"{experiment.suite}:{task}", arm, seed)
                plan.steps.append(_finetuning(experiment, scale, precision, curve, model, needs))
    curves = tuple(step.name for step in plan.steps if step.curve)
    drawing = ("plot", OUT, "--out", f"{OUT}/curves.png")
    plan.steps.append(Step("plot", drawing, "curves.png", curves))
    return plan


def _pretraining(experiment: Experiment, scale: Scale, precision: str) -> list[Step]:
    """Videos, and the model that learns from them."""
    make = {"manipulation": _manipulation_videos, "triped": _triped_videos, "walker": _walker_videos}
    videos = make[experiment.videos](scale, precision)
    preset = {"manipulation": "metaworld", "triped": "dmc", "walker": "small"}[experiment.videos]
    folders = [f"{OUT}/{step.writes}" for step in videos]
    arguments = ("pretrain", "--preset", preset, "--data", *folders, "--out", f"{OUT}/pretrain")
    options = _options({"model.precision": precision} | dict(scale.pretrain))
    return [*videos, Step("pretrain", arguments + options, "pretrain", tuple(step.name for step in videos))]


def _manipulation_videos(scale: Scale, precision: str) -> list[Step]:
    tasks = [one.partition(":")[2] for one in list_tasks("metaworld")]
    others = [task for task in tasks if task not in MANIPULATION_TASKS][: scale.video_tasks]
    collect = ("--policy", "scripted", "--cameras", *CAMERAS)
    return [_collect("metaworld", "metaworld:" + task, scale.videos, collect) for task in others]


def _walker_videos(scale: Scale, precision: str) -> list[Step]:
    return [_collect("small", "dmc:walker-walk", scale.videos, ("--policy", "random"))]


def _triped_videos(scale: Scale, precision: str) -> list[Step]:
    """DreamerV2 learns to walk; what it saw on the way, its replay, are the videos."""
    arguments = ("finetune", "--preset", "dmc", "--env", "dmc:triped-walk", "--out", f"{OUT}/videos/triped-walk")
    options = (*ARMS["dreamerv2"].options, *_options({"model.precision": precision} | dict(scale.agent)))
    return [Step("videos/triped-walk", arguments + options, "videos/triped-walk")]


def _collect(preset: str, env: str, options: Flags, more: tuple[str, ...]) -> Step:
    place = "videos/" + env.partition(":")[2]
    arguments = ("collect", "--preset", preset, "--env", env, "--out", f"{OUT}/{place}")
    return Step(place, arguments + more + _options(options), place)


def _finetuning(
    experiment: Experiment, scale: Scale, precision: str, curve: Curve, model: str, needs: tuple[str, ...]
) -> Step:
    arm = ARMS[curve.arm]
    name = f"finetune/{curve.task.partition(':')[2]}/{curve.arm}/seed-{curve.seed}"
    arguments = ("finetune", "--preset", experiment.preset, "--env", curve.task, "--out", f"{OUT}/{name}")
    which = ("--seed", str(curve.seed), *arm.options, *(("--pretrained", model) if arm.pretrained else ()))
    options = _options({"model.precision": precision} | dict(scale.finetune))
    return Step(name, arguments + which + options, name, needs if arm.pretrained else (), curve)


def _options(flags: Flags) -> tuple[str, ...]:
    return tuple(part for name, value in flags.items() for part in (f"--{name}", str(value)))

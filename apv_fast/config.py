"""Every setting of every command, typed and documented; the defaults are the paper's Meta-world setup.

A run saves its whole configuration. Presets (:data:`PRESETS`) change defaults; the command line changes single fields.
pydantic is imported when a configuration is written or read: a machine that only computes need not have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

Quality = Literal["paper", "fast"]
Device = Literal["auto", "cpu", "cuda"]
Backend = Literal["auto", "reference", "cpu", "triton", "cuda"]
Graph = Literal["auto", "on", "off"]
ReplayDevice = Literal["auto", "host", "device"]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the networks; pre-training and fine-tuning must agree on them."""

    deter: int = 1024
    """Size of the GRU's state (D)."""
    hidden: int = 1024
    """Width of the RSSM's hidden layers (H)."""
    stoch: int = 32
    """Number of latent variables (S)."""
    discrete: int = 32
    """Classes of each latent variable (C); 0 for Gaussian latents."""
    action_pad: int = 50
    """Width that actions are padded to with zeros, so that one weight file fits every task."""
    cnn_depth: int = 48
    """Channels of the first encoder layer; all others are multiples of it."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the products; weights, statistics and losses are float32 either way."""


@dataclass(frozen=True)
class KLConfig:
    """The loss between posterior and prior."""

    free: float = 0.0
    """Nats below which the divergence costs nothing."""
    balance: float = 0.8
    """Share of the loss that trains the prior."""
    free_avg: bool = True
    """Compare the free nats with the mean over steps instead of with every step."""
    forward: bool = False
    """Swap posterior and prior."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Keras' Adam, see apv_fast.optim."""

    lr: float = 3e-4
    """Learning rate."""
    eps: float = 1e-5
    """Added to the square root of the uncorrected second moment."""
    clip: float = 100.0
    """Largest global norm of the gradients."""
    weight_decay: float = 1e-6
    """Share of every weight that a step takes away, whatever the learning rate."""


@dataclass(frozen=True)
class WorldConfig:
    """How an environment is run and seen."""

    action_repeat: int = 1
    """Environment steps that one action lasts."""
    time_limit: int | None = None
    """Episode length in environment steps (before action repeat); none keeps the suite's own."""
    camera: str | None = None
    """Name or number of the camera; none is the suite's usual one."""
    quality: Quality = "paper"
    """Rendering: the paper's look, or a fast one without shadows and multisampling."""


@dataclass(frozen=True)
class VideoBonusConfig:
    """The exploration bonus from action-free features."""

    beta: float = 1.0
    """Weight of the bonus beside the reward (β)."""
    queue_size: int = 4096
    """Recent feature windows that a new one is compared with."""
    projection_dim: int = 128
    """Width of the random projection."""
    k: int = 16
    """Nearest neighbours."""
    window: int = 5
    """Steps that are averaged before the comparison (τ)."""
    reduce: Literal["mean", "kth"] = "mean"
    """Mean of the k distances (official code), or the k-th (paper)."""
    exclude_self: bool = False
    """Leave each window itself out of its neighbours."""
    momentum: float = 0.99
    """Of the running magnitude that the bonus is divided by."""


@dataclass(frozen=True)
class BehaviorConfig:
    """Actor and critic, trained in imagination (DreamerV2)."""

    horizon: int = 15
    """Imagined steps."""
    discount: float = 0.99
    """Discount factor of a step (γ)."""
    return_lambda: float = 0.95
    """Mixture of the λ-return."""
    entropy: float = 1e-4
    """Weight of the actor's entropy."""
    actor_grad: Literal["auto", "dynamics", "reinforce", "both"] = "auto"
    """Gradient of the actor; auto is dynamics for continuous actions and reinforce for discrete ones."""
    actor_grad_mix: float = 0.1
    """Share of the dynamics gradient with both."""
    layers: int = 4
    """Hidden layers of actor, critic, reward and discount head."""
    units: int = 400
    """Their width."""
    min_std: float = 0.1
    """Least scale of the continuous actor."""
    slow_every: int = 100
    """Updates between copies of the critic into the slow critic."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=8e-5))
    """Of actor and critic, each with its own."""


@dataclass(frozen=True)
class CollectConfig:
    """Render episodes of an environment into a folder of videos."""

    env: str
    """Environment, for example dmc:walker-walk."""
    out: Path
    """Folder to write; episodes go to its train_episodes/."""
    episodes: int = 10
    """How many, those already in the folder included."""
    policy: str = "random"
    """random, or the run directory of a trained policy."""
    world: WorldConfig = field(default_factory=WorldConfig)
    """How the environment is run and seen."""
    seed: int = 0
    """Fixes everything random."""
    device: Device = "auto"
    """Where a trained policy runs."""
    backend: Backend = "auto"
    """Which kernels run, see apv-fast info."""


@dataclass(frozen=True)
class PretrainConfig:
    """Learn an action-free video model."""

    data: tuple[Path, ...]
    """Folders with episodes, as apv-fast collect writes them."""
    out: Path
    """Run directory to write."""
    resume: bool = False
    """Go on with the run in out from its last checkpoint."""
    steps: int = 600_000
    """Updates."""
    batch: int = 16
    """Sequences a batch (B)."""
    length: int = 25
    """Steps a sequence (T)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Sizes."""
    kl: KLConfig = field(default_factory=KLConfig)
    """Loss between posterior and prior."""
    kl_scale: float = 0.1
    """Weight of that loss beside the image's."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Of the whole model."""
    prioritize_ends: bool = True
    """Draw the last possible start of an episode more often."""
    capacity: int = 2_000_000
    """Steps of video to sample from, newest kept."""
    log_every: int = 100
    """Updates between lines of metrics."""
    video_every: int = 10_000
    """Updates between open-loop videos."""
    checkpoint_every: int = 1000
    """Updates between checkpoints."""
    seed: int = 0
    """Fixes everything random."""
    device: Device = "auto"
    """Where to compute."""
    backend: Backend = "auto"
    """Which kernels run, see apv-fast info."""
    graph: Graph = "auto"
    """Record an update once as a CUDA graph and replay it: auto does so on a GPU; the numbers are the same."""
    replay_device: ReplayDevice = "auto"
    """Where frames to draw from are held: auto keeps a copy on a GPU as long as it fits there."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Learn a task with a stacked world model, imagination and the video bonus."""

    env: str
    """Environment, for example dmc:walker-walk."""
    out: Path
    """Run directory to write."""
    pretrained: Path | None = None
    """Run directory of apv-fast pretrain; none starts from scratch."""
    resume: bool = False
    """Go on with the run in out from its last checkpoint."""
    stacked: bool = True
    """Stack an action-conditional RSSM on the action-free one; else a single RSSM, which is also the default without
    pretrained and with no bonus: plain DreamerV2."""
    bonus: bool = True
    """Add the video bonus to the reward."""
    steps: int = 256_000
    """Agent steps in all, the prefill included."""
    prefill: int = 5000
    """Agent steps with random actions before training."""
    first_updates: int = 100
    """Updates before the policy acts."""
    train_every: int = 5
    """Agent steps an update."""
    batch: int = 50
    """Sequences a batch (B)."""
    length: int = 50
    """Steps a sequence (T)."""
    world: WorldConfig = field(default_factory=lambda: WorldConfig(time_limit=500, camera="corner"))
    """How the environment is run and seen."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Sizes."""
    kl: KLConfig = field(default_factory=KLConfig)
    """Loss between posterior and prior."""
    af_kl_scale: float = 0.0
    """Weight of the action-free model's loss."""
    concat_embed: bool = False
    """The action-conditional RSSM sees the image embedding beside the action-free features."""
    discount_head: bool = False
    """Learn when episodes end."""
    discount_grad: bool = False
    """Let the discount head's loss train the world model too."""
    video_bonus: VideoBonusConfig = field(default_factory=VideoBonusConfig)
    """The exploration bonus."""
    behavior: BehaviorConfig = field(default_factory=BehaviorConfig)
    """Actor and critic."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Of the world model."""
    freeze_updates: int = 101
    """First updates in which encoder and action-free RSSM have a learning rate of 0 (with pretrained only)."""
    prioritize_ends: bool = True
    """Draw the last possible start of an episode more often."""
    capacity: int = 1_000_000
    """Steps of experience to sample from, newest kept."""
    eval_every: int = 10_000
    """Agent steps between evaluations."""
    eval_episodes: int = 10
    """Episodes an evaluation."""
    log_every: int = 1000
    """Agent steps between lines of metrics."""
    video_every: int = 10_000
    """Agent steps between open-loop videos."""
    checkpoint_every: int = 5000
    """Agent steps between checkpoints."""
    seed: int = 0
    """Fixes everything random."""
    device: Device = "auto"
    """Where to compute."""
    backend: Backend = "auto"
    """Which kernels run, see apv-fast info."""
    graph: Graph = "auto"
    """Record an update once as a CUDA graph and replay it: auto does so on a GPU; the numbers are the same."""
    replay_device: ReplayDevice = "auto"
    """Where frames to draw from are held: auto keeps a copy on a GPU as long as it fits there."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Play episodes with a trained policy and print the scores."""

    run: Path
    """Run directory of apv-fast finetune."""
    episodes: int = 10
    """How many."""
    seed: int = 0
    """Fixes the starts; the same for the random policy."""
    device: Device = "auto"
    """Where to compute."""
    backend: Backend = "auto"
    """Which kernels run, see apv-fast info."""


@dataclass(frozen=True)
class VideoConfig:
    """Make an open-loop prediction video: truth, model, error."""

    run: Path
    """Run directory of apv-fast pretrain or finetune."""
    data: tuple[Path, ...] = ()
    """Folders with episodes; none takes those that the run learnt from."""
    out: Path | None = None
    """GIF to write; none puts it into the run's videos/."""
    seed: int = 0
    """Fixes which sequences are shown and what the model imagines."""
    device: Device = "auto"
    """Where to compute."""
    backend: Backend = "auto"
    """Which kernels run, see apv-fast info."""


@dataclass(frozen=True)
class PlotConfig:
    """Draw learning curves."""

    runs: tuple[Path, ...]
    """Run directories."""
    out: Path = Path("curves.png")
    """Picture to write."""
    metric: str = "eval_return"
    """What to draw, a name in metrics.jsonl."""
    task: str | None = None
    """A task of the paper whose published curves are drawn beside, for example dmc_quadruped_walk."""


@dataclass(frozen=True)
class InfoConfig:
    """Print versions, devices and backends, to paste into a bug report."""


@dataclass(frozen=True)
class DemoConfig:
    """Watch APV work: collect videos, pre-train, fine-tune on a related task, evaluate. See the README."""

    out: Path = Path("runs/demo")
    """Folder for everything that it makes; what an earlier demo left there is replaced."""
    quick: bool = False
    """The same path in under two minutes, too short to learn anything."""
    seed: int = 0
    """Fixes everything random."""


@dataclass(frozen=True)
class Preset:
    """Defaults of the commands for one kind of task."""

    collect: CollectConfig
    pretrain: PretrainConfig
    finetune: FinetuneConfig


_DATA, _OUT, _ENV = (Path("data"),), Path("run"), "dmc:walker-walk"  # stand-ins: the command line must give them

_METAWORLD = Preset(
    CollectConfig(_ENV, _OUT, world=WorldConfig(time_limit=500, camera="corner")),
    PretrainConfig(_DATA, _OUT),
    FinetuneConfig(_ENV, _OUT),
)

_DMC_WORLD = WorldConfig(action_repeat=2)
_DMC = Preset(
    CollectConfig(_ENV, _OUT, world=_DMC_WORLD),
    PretrainConfig(_DATA, _OUT, length=50, kl=KLConfig(free=1.0), kl_scale=1.0, prioritize_ends=False),
    FinetuneConfig(
        _ENV,
        _OUT,
        steps=502_000,
        prefill=1000,
        batch=16,
        world=_DMC_WORLD,
        kl=KLConfig(free=1.0),
        concat_embed=True,
        video_bonus=VideoBonusConfig(beta=0.1),
        freeze_updates=0,
        prioritize_ends=False,
        eval_episodes=1,
    ),
)

_SMALL_WORLD = WorldConfig(action_repeat=2, quality="fast")
_SMALL_MODEL = ModelConfig(deter=200, hidden=200, stoch=16, discrete=16, cnn_depth=16)
_SMALL = Preset(
    replace(_DMC.collect, world=_SMALL_WORLD),
    replace(
        _DMC.pretrain,
        steps=10_000,
        batch=8,
        length=25,
        model=_SMALL_MODEL,
        video_every=2000,
        checkpoint_every=500,
    ),
    replace(
        _DMC.finetune,
        steps=50_000,
        batch=8,
        length=25,
        world=_SMALL_WORLD,
        model=_SMALL_MODEL,
        video_bonus=VideoBonusConfig(beta=0.1, queue_size=1024),
        behavior=BehaviorConfig(units=200),
        checkpoint_every=2000,
        eval_every=5000,
        eval_episodes=3,
    ),
)

PRESETS: dict[str, Preset] = {"metaworld": _METAWORLD, "dmc": _DMC, "small": _SMALL}

Config = TypeVar("Config")


class ConfigError(ValueError):
    """A configuration cannot be used; the message names the field."""


def to_dict(config: object) -> dict[str, Any]:
    """A configuration as nested dictionaries that JSON can hold."""
    from pydantic import TypeAdapter

    result: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return result


def from_dict(kind: type[Config], values: Mapping[str, Any], source: Path) -> Config:
    """The configuration that :func:`to_dict` made ``values`` of; ``source`` is where they come from.

    Raises:
        ConfigError: a field is missing, unknown or has a wrong value; names ``source`` and the field.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        config = TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{source}: {name}: {first['msg']} (is {first['input']!r:.80})") from error
    if unknown := _unknown(values, to_dict(config)):
        raise ConfigError(f"{source}: {unknown}: is not a setting of this version; did a newer one write the file?")
    return config


def _unknown(values: Mapping[str, Any], known: Mapping[str, Any], prefix: str = "") -> str:
    """The first field of ``values``, at any depth, that ``known`` does not have; empty if there is none."""
    for name, value in values.items():
        if name not in known:
            return prefix + name
        if isinstance(value, Mapping) and (inner := _unknown(value, known[name], f"{prefix}{name}.")):
            return inner
    return ""


def check(config: PretrainConfig | FinetuneConfig) -> None:
    """See that the numbers make sense together.

    Raises:
        ConfigError: they do not; names the field.
    """
    _at_least(1, config, "steps", "batch", "length", "capacity", "log_every", "video_every", "checkpoint_every")
    _at_least(1, config.model, "deter", "hidden", "stoch", "cnn_depth", prefix="model.")
    _at_least(0, config.model, "discrete", "action_pad", prefix="model.")
    if isinstance(config, PretrainConfig):
        return
    _at_least(1, config, "train_every", "eval_every", "eval_episodes")
    _at_least(0, config, "prefill", "first_updates", "freeze_updates")
    _at_least(1, config.behavior, "layers", "units", "slow_every", prefix="behavior.")
    if config.bonus and config.length < config.video_bonus.window:
        raise ConfigError(
            f"length is {config.length}; it must be at least video_bonus.window = {config.video_bonus.window}"
        )
    _at_least(2, config.behavior, "horizon", prefix="behavior.")


def _at_least(least: int, config: object, *names: str, prefix: str = "") -> None:
    for name in names:
        if (value := getattr(config, name)) < least:
            raise ConfigError(f"{prefix}{name} is {value}; it must be at least {least}")

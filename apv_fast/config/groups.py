"""Groups of settings that commands share: sizes, losses, optimiser, world, bonus, behaviour."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Quality = Literal["paper", "fast"]
Precision = Literal["fp32", "bf16"]
Device = Literal["auto", "cpu", "cuda"]
Backend = Literal["auto", "reference", "cpu", "triton", "cuda"]
Graph = Literal["auto", "on", "off"]
ReplayDevice = Literal["auto", "host", "device"]
VideoFormat = Literal["npz", "mp4", "store"]


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
    precision: Precision = "fp32"
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
class SlurmConfig:
    """What every job of an experiment asks Slurm for."""

    partition: str | None = None
    """Where to queue; none is the cluster's usual one."""
    account: str | None = None
    """Who pays."""
    qos: str | None = None
    """Quality of service."""
    gpus: int = 1
    """GPUs a job."""
    cpus: int = 8
    """Cores a job."""
    memory_gb: int = 32
    """Memory a job."""
    minutes: int = 1440
    """Longest time of a job; what is not done by then is saved and queued again."""
    setup: tuple[str, ...] = ()
    """Shell commands that a job begins with, such as "module load cuda"."""

"""The settings of every command."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from apv_fast.config.groups import (
    Backend,
    BehaviorConfig,
    Device,
    Graph,
    KLConfig,
    ModelConfig,
    OptimizerConfig,
    Precision,
    ReplayDevice,
    SlurmConfig,
    VideoBonusConfig,
    VideoFormat,
    WorldConfig,
)


@dataclass(frozen=True)
class CollectConfig:
    """Render episodes of an environment into a folder of videos."""

    env: str
    """Environment, for example dmc:walker-walk."""
    out: Path
    """Folder to write: videos, dataset.json and a README.md with a contact sheet."""
    list: bool = False
    """Only show the environments, policies and cameras that there are; with env the cameras of that one."""
    episodes: int = 10
    """How many, those already in the folder included."""
    policy: str = "random"
    """random, scripted (the experts of metaworld), or the run directory of a trained policy."""
    cameras: tuple[str, ...] = ()
    """Views of the same episodes, a video each; none takes world.camera alone, which is also what a trained policy
    sees."""
    format: VideoFormat = "npz"
    """Official episode files with actions and rewards, or videos only: MP4 files, or a store to pre-train from."""
    processes: int = 1
    """Episodes that are played at the same time; they are the same ones, however many."""
    world: WorldConfig = field(default_factory=WorldConfig)
    """How the environment is run and seen."""
    seed: int = 0
    """Fixes everything random."""
    device: Device = "auto"
    """Where a trained policy runs."""
    backend: Backend = "auto"
    """Which kernels run, see apv-fast info."""


@dataclass(frozen=True)
class IngestConfig:
    """Convert videos of any kind to a compact store, once. Run it again to go on, or to add new files."""

    sources: tuple[Path, ...]
    """Videos, folders of videos or of frames, folders of npz episodes, LeRobot v3 datasets, robomimic HDF5 files."""
    out: Path = Path("store")
    """Folder of the store."""
    size: int = 64
    """Height and width of the frames that are stored."""
    aspect: Literal["crop", "pad", "stretch"] = "crop"
    """Of frames that are not square: crop to the middle square, pad with black, or stretch."""
    fps: float | None = None
    """Frames a second to store; none takes every frame. Sources that know no time are taken as they are."""
    max_frames: int | None = None
    """Cut longer videos into episodes of this many frames."""
    min_frames: int = 2
    """Leave out shorter ones."""
    camera: str | None = None
    """Which camera, for datasets that have several."""
    workers: int = 0
    """Processes that decode; 0 is one a core."""
    verify: bool = False
    """Then read the whole store again and compare it with its checksums."""


@dataclass(frozen=True)
class ShardsConfig:
    """Write a store as shards: tar files that many machines stream. Run it again to go on."""

    store: Path
    """Folder of the store."""
    out: Path = Path("shards")
    """Folder to write."""
    chunk_frames: int = 100
    """Longest sequence that can be trained on; longer episodes are cut into pieces of this many frames."""
    shard_mib: int = 256
    """About how large a file is; every process that trains needs one at least."""
    seed: int = 0
    """Fixes the order of the pieces."""


@dataclass(frozen=True)
class PretrainConfig:
    """Learn an action-free video model."""

    data: tuple[Path, ...]
    """Videos: folders of episodes, stores, raw videos, or shards (videos-{000000..000099}.tar); each as PATH, or all as
    PATH:WEIGHT."""
    out: Path
    """Run directory to write."""
    resume: bool = False
    """Go on with the run in out from its last checkpoint."""
    cache: Path | None = None
    """Folder for raw videos, which are decoded once; none takes data/ in the run directory."""
    validation: float = 0.05
    """Share of the episodes that are not trained on but measured on."""
    prefetch: int = 2
    """Batches that are read ahead while an update runs."""
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
    """Steps to sample from in folders of episodes, newest kept; stores and shards are used whole."""
    log_every: int = 100
    """Updates between lines of metrics."""
    validate_every: int = 1000
    """Updates between measurements on the episodes that are not trained on."""
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
    conv_search: bool = False
    """Let cuDNN time its algorithms before an update is recorded; then two runs of one seed may round differently."""
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
    envs: int = 1
    """Environments that are played side by side, each in a process of its own if there are several."""
    overlap: bool = False
    """Play on while an update runs, with the weights of the update before."""
    steps: int = 256_000
    """Agent steps in all, of all environments together, the prefill included."""
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
    conv_search: bool = False
    """Let cuDNN time its algorithms before an update is recorded; then two runs of one seed may round differently."""
    replay_device: ReplayDevice = "auto"
    """Where frames to draw from are held: auto keeps a copy on a GPU as long as it fits there."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Play episodes with a trained policy and print the scores."""

    run: Path
    """Run directory of apv-fast finetune."""
    episodes: int = 10
    """How many."""
    envs: int = 1
    """Environments that are played side by side, each in a process of its own if there are several."""
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
class ImportConfig:
    """Make a run directory of what the official implementation's pre-training left. Fine-tune from it."""

    folder: Path
    """Folder with encoder_variables.pkl, rssm_variables.pkl and decoder_variables.pkl."""
    out: Path = Path("runs/official")
    """Run directory to write."""
    data: Path | None = None
    """Folder with the episodes that the model learnt from; none looks for train_episodes beside the weights."""
    discrete: int | None = None
    """Classes of each latent variable (C), where neither the weights nor a config.yaml beside them tell."""


@dataclass(frozen=True)
class ExportConfig:
    """Write a run's modules as safetensors and JSON. from_pretrained of apv_fast.nn reads them."""

    run: Path
    """Run directory of apv-fast pretrain or finetune."""
    out: Path = Path("exported")
    """Folder to write: one folder a module, and config.json."""


@dataclass(frozen=True)
class PlotConfig:
    """Draw learning curves."""

    runs: tuple[Path, ...]
    """Run directories, each a curve of its own; or the folder of one experiment, whose seeds are put together."""
    out: Path = Path("curves.png")
    """Picture to write; an experiment's numbers go beside it, as JSON."""
    metric: str | None = None
    """What to draw, a name in metrics.jsonl; none is what the experiment compares, for runs eval_return."""
    task: str | None = None
    """A task of the paper whose published curves are drawn beside, for example dmc_quadruped_walk; an experiment knows
    its own."""


@dataclass(frozen=True)
class ExperimentConfig:
    """Run one of the paper's setups, from videos to learning curves. The same command goes on where it stopped."""

    name: tuple[str, ...]
    """The experiment; none with --list."""
    list: bool = False
    """Show the experiments, their sizes, tasks and arms."""
    dry_run: bool = False
    """Show every step, its command line and its state, and run nothing."""
    out: Path | None = None
    """Folder for everything that it makes; none is runs/NAME-SIZE."""
    size: Literal["paper", "laptop", "quick"] | None = None
    """How much of everything: the paper's figures, days of a CPU, or a test of the path; none is the largest it has."""
    tasks: tuple[str, ...] = ()
    """Which of its tasks to learn; none is all."""
    arms: tuple[str, ...] = ()
    """Which methods to compare; none is all."""
    seeds: tuple[int, ...] = ()
    """Of the fine-tuning runs; none is the size's own, 1 to 8 in the paper's."""
    pretrained: Path | None = None
    """Start from this run of apv-fast pretrain (or import-official) instead of making videos and pre-training."""
    precision: Precision = "fp32"
    """Of the products."""
    parallel: int | None = None
    """Most steps at a time; none is one on this machine, whose cores they share, and no limit in Slurm."""
    launcher: Literal["local", "slurm"] = "local"
    """Processes of this machine, or jobs of a Slurm cluster."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    """What a job asks for."""


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
    precision: Precision = "fp32"
    """Of the products."""
    seed: int = 0
    """Fixes everything random."""

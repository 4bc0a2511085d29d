"""Every setting of every command, typed and documented; the defaults are the paper's Meta-world setup.

A run saves its whole configuration. Presets (:data:`PRESETS`) change defaults; the command line changes single fields.
"""

from apv_fast.config.commands import (
    CollectConfig,
    DemoConfig,
    EvaluateConfig,
    ExperimentConfig,
    ExportConfig,
    FinetuneConfig,
    ImportConfig,
    InfoConfig,
    IngestConfig,
    PlotConfig,
    PretrainConfig,
    ShardsConfig,
    VideoConfig,
)
from apv_fast.config.groups import (
    Backend,
    BehaviorConfig,
    Device,
    Graph,
    KLConfig,
    ModelConfig,
    OptimizerConfig,
    Precision,
    Quality,
    ReplayDevice,
    SlurmConfig,
    VideoBonusConfig,
    VideoFormat,
    WorldConfig,
)
from apv_fast.config.presets import (
    PRESETS,
    Preset,
)
from apv_fast.config.serialization import from_dict, to_dict
from apv_fast.config.validation import ConfigError, check, user_settings

__all__ = [
    "PRESETS",
    "Backend",
    "BehaviorConfig",
    "CollectConfig",
    "ConfigError",
    "DemoConfig",
    "Device",
    "EvaluateConfig",
    "ExperimentConfig",
    "ExportConfig",
    "FinetuneConfig",
    "Graph",
    "ImportConfig",
    "InfoConfig",
    "IngestConfig",
    "KLConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PlotConfig",
    "Precision",
    "Preset",
    "PretrainConfig",
    "Quality",
    "ReplayDevice",
    "ShardsConfig",
    "SlurmConfig",
    "VideoBonusConfig",
    "VideoConfig",
    "VideoFormat",
    "WorldConfig",
    "check",
    "from_dict",
    "to_dict",
    "user_settings",
]

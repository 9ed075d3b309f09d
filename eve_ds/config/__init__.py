"""One typed configuration tree: a YAML preset, then a file or dotted overrides, then validation.

Unknown keys are refused with the nearest known name. What DeepSpeed owns (ZeRO stage, precision, bucket sizes) stays in
the DeepSpeed JSON; where both speak of one thing see :func:`eve_ds.parallel.settings.resolve_deepspeed_config`.
"""

from eve_ds.config.data import DataConfig, MaskingConfig, SourceConfig, ValidationConfig
from eve_ds.config.loading import load_config, parse_config, parse_written_config, presets
from eve_ds.config.model import ModelConfig, MoEConfig, Objective, PixelDecoderConfig
from eve_ds.config.section import ConfigError, Section
from eve_ds.config.tasks import ExamplesConfig, TaskConfig
from eve_ds.config.train import LossConfig, OptimizerConfig, ParallelConfig, TrainConfig
from eve_ds.config.tree import Config

__all__ = [
    "Config",
    "ConfigError",
    "DataConfig",
    "ExamplesConfig",
    "LossConfig",
    "MaskingConfig",
    "MoEConfig",
    "ModelConfig",
    "Objective",
    "OptimizerConfig",
    "ParallelConfig",
    "PixelDecoderConfig",
    "Section",
    "SourceConfig",
    "TaskConfig",
    "TrainConfig",
    "ValidationConfig",
    "load_config",
    "parse_config",
    "parse_written_config",
    "presets",
]

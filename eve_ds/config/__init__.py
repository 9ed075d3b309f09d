"""Typed configuration tree: a YAML preset or file, then dotted overrides, then validation.

An unknown key is an error that suggests the nearest known name. DeepSpeed's own settings (ZeRO stage, bucket sizes)
stay in the DeepSpeed JSON. :func:`eve_ds.parallel.settings.resolve_deepspeed_config` reconciles the settings that
both files have: batch sizes, precision, gradient clipping, expert parallelism.
"""

from eve_ds.config.data import DataConfig, RemoteConfig, SourceConfig, ValidationConfig
from eve_ds.config.loading import load_config, parse_config, parse_written_config, presets
from eve_ds.config.loss import LossConfig
from eve_ds.config.masking import MaskingConfig
from eve_ds.config.model import ModelConfig, MoEConfig, Objective, PixelDecoderConfig
from eve_ds.config.optimizer import OptimizerConfig
from eve_ds.config.parallel import ParallelConfig, check_experts_per_rank
from eve_ds.config.section import ConfigError, Section
from eve_ds.config.task import ExamplesConfig, TaskConfig
from eve_ds.config.train import TrainConfig
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
    "RemoteConfig",
    "Section",
    "SourceConfig",
    "TaskConfig",
    "TrainConfig",
    "ValidationConfig",
    "check_experts_per_rank",
    "load_config",
    "parse_config",
    "parse_written_config",
    "presets",
]

"""Reconcile DeepSpeed's JSON with the YAML: batch triangle, precision, clipping, expert parallelism."""

from __future__ import annotations

import json
import math
from typing import Any

from deepspeed.accelerator import get_accelerator

from eve_ds.config import Config, ConfigError, TrainConfig
from eve_ds.objectives.registry import objectives_of
from eve_ds.parallel.refused import check_topology


def resolve_deepspeed_config(
    deepspeed_config: dict[str, Any], config: Config, world_size: int
) -> tuple[Config, dict[str, Any]]:
    """Reconcile the DeepSpeed JSON with the YAML.

    A value that is "auto" or absent in the JSON is taken from the YAML. A value that only the JSON sets is taken into
    the configuration. A value that both set must be equal.

    Returns:
        The configuration with batch triangle, precision, clipping and ep_size settled, and the JSON without any "auto".

    Raises:
        ConfigError: the two files contradict each other (the message names both places), the batch sizes do not fit,
            the topology is refused, an "auto" has no source, or a setting would compete with ours or have no effect.
    """
    if not isinstance(deepspeed_config, dict):
        raise ConfigError(f"the DeepSpeed JSON must be a mapping of settings, not a {type(deepspeed_config).__name__}")
    resolved = json.loads(json.dumps(deepspeed_config))
    train = config.train
    _refuse_settings(resolved)
    batch = _take(resolved, "train_batch_size", train, "train_batch_size")
    micro = _take(resolved, "train_micro_batch_size_per_gpu", train, "micro_batch_size")
    accumulation = _take(resolved, "gradient_accumulation_steps", train, "gradient_accumulation_steps")
    micro, accumulation = batch_triangle(batch, micro, accumulation, world_size)
    min_pairs = max(objective.min_pairs for objective in objectives_of(config.model))
    if micro < min_pairs:
        raise ConfigError(
            f"model.objectives ({', '.join(config.model.objectives)}) needs a micro_batch_size ({micro}) of "
            f"{min_pairs} or more, since it compares the pairs of a micro-batch: raise train.micro_batch_size"
        )
    precision = _precision(resolved, train)
    clip = _clipping(resolved, config)
    resolved |= {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "bf16": {**_section(resolved, "bf16"), "enabled": precision == "bf16"},
        "fp16": {**_section(resolved, "fp16"), "enabled": precision == "fp16"},
        "steps_per_print": resolved.get("steps_per_print", 10**9),
        "zero_allow_untested_optimizer": True,
    }
    zero = resolved["zero_optimization"] = {"stage": 0, **_section(resolved, "zero_optimization")}
    _refuse_auto(resolved, "")
    _check_precision(precision, zero["stage"], clip)
    ep_size = config.parallel.ep_size or math.gcd(world_size, config.model.moe.num_experts)
    check_topology(
        world_size=world_size,
        num_experts=config.model.moe.num_experts,
        ep_size=ep_size,
        zero_stage=zero["stage"],
        clip_grad_norm=clip,
        data_before_expert=bool(resolved.get("use_data_before_expert_parallelism", False)),
    )
    settled = {
        "train_batch_size": batch,
        "micro_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "precision": precision,
    }
    return (
        config.model_copy(
            update={
                "train": train.model_copy(update=settled),
                "optimizer": config.optimizer.model_copy(update={"clip_grad_norm": clip}),
                "parallel": config.parallel.model_copy(update={"ep_size": ep_size}),
            }
        ),
        resolved,
    )


def batch_triangle(batch: int, micro: int | None, accumulation: int | None, world_size: int) -> tuple[int, int]:
    """Micro-batch size and accumulation steps such that batch = micro * accumulation * world_size.

    Raises:
        ConfigError: no such whole numbers exist.
    """
    rule = (
        f"train_batch_size ({batch}) must equal micro_batch_size ({micro or 'free'}) * "
        f"gradient_accumulation_steps ({accumulation or 'free'}) * ranks ({world_size})"
    )
    if micro is None and accumulation is None:
        accumulation = 1
    if micro is None:
        micro = batch // (world_size * (accumulation or 1))
    if accumulation is None:
        accumulation = batch // (world_size * micro)
    if micro * accumulation * world_size != batch or micro < 1:
        raise ConfigError(f"{rule}; leave one of them out, or change train_batch_size to a multiple of the others")
    return micro, accumulation


def _take(resolved: dict[str, Any], key: str, train: TrainConfig, field: str) -> Any:
    """Value of a setting that either file may hold; `None` if neither does."""
    ours, theirs = getattr(train, field), resolved.get(key, "auto")
    if theirs == "auto":
        return ours
    if not isinstance(theirs, int) or theirs < 1:
        raise ConfigError(f'{key} ({theirs!r}) in the DeepSpeed JSON must be a whole number above 0, or "auto"')
    if field in train.model_fields_set and ours is not None and ours != theirs:
        raise ConfigError(_contradiction(f"train.{field}", ours, key, theirs))
    return theirs


def _contradiction(ours: str, our_value: Any, theirs: str, their_value: Any) -> str:
    return (
        f"{ours} ({our_value}) in the YAML contradicts {theirs} ({their_value}) in the DeepSpeed JSON: "
        'set the JSON to "auto", or make them equal'
    )


def _precision(resolved: dict[str, Any], train: TrainConfig) -> str:
    wanted = {name: _section(resolved, name).get("enabled", "auto") for name in ("bf16", "fp16")}
    if all(enabled is True for enabled in wanted.values()):
        raise ConfigError("bf16.enabled and fp16.enabled in the DeepSpeed JSON are both true: turn one of them off")
    chosen = next((name for name, enabled in wanted.items() if enabled is True), None)
    explicit = "precision" in train.model_fields_set
    if chosen is not None:
        if explicit and train.precision != chosen:
            raise ConfigError(_contradiction("train.precision", train.precision, f"{chosen}.enabled", True))
        return chosen
    if wanted.get(train.precision) is False:
        if explicit:
            raise ConfigError(_contradiction("train.precision", train.precision, f"{train.precision}.enabled", False))
        return "fp32"
    return train.precision


def _clipping(resolved: dict[str, Any], config: Config) -> float:
    ours, theirs = config.optimizer.clip_grad_norm, resolved.get("gradient_clipping", "auto")
    if theirs == "auto":
        return ours
    if not isinstance(theirs, int | float) or theirs < 0:
        raise ConfigError(f'gradient_clipping ({theirs!r}) in the DeepSpeed JSON must be a number from 0 on, or "auto"')
    if "clip_grad_norm" in config.optimizer.model_fields_set and ours != theirs:
        raise ConfigError(_contradiction("optimizer.clip_grad_norm", ours, "gradient_clipping", theirs))
    return float(theirs)


def _check_precision(precision: str, stage: int, clip: float) -> None:
    accelerator = get_accelerator()
    supported = {"bf16": accelerator.is_bf16_supported(), "fp16": accelerator.is_fp16_supported(), "fp32": True}
    if not supported[precision]:
        raise ConfigError(
            f"precision {precision} cannot be used on this device ({accelerator.device_name()}): take another one of "
            f"{', '.join(name for name in supported if supported[name])}"
        )
    if precision != "fp32" and stage == 0 and clip > 0:
        raise ConfigError(
            f"optimizer.clip_grad_norm ({clip:g}) cannot be used with precision {precision} and "
            "zero_optimization.stage 0, where DeepSpeed leaves the experts out of the gradient norm: use stage 1 or 2, "
            "or clip_grad_norm=0"
        )


def _refuse_settings(resolved: dict[str, Any]) -> None:
    """Refuse settings that would compete with ours, or turn off the check of gradients before the update."""
    for key, ours in (("optimizer", "optimizer"), ("scheduler", "optimizer (warmup_steps, decay)")):
        if key in resolved:
            raise ConfigError(f"{key} in the DeepSpeed JSON has no effect here: remove it and set {ours} in the YAML")
    for section, key in (("bf16", "check_grad_overflow"), ("zero_optimization", "compute_grad_norm")):
        if _section(resolved, section).get(key) is False:
            raise ConfigError(
                f"{section}.{key} (false) in the DeepSpeed JSON must be left out: a gradient that is not finite would "
                "be applied"
            )


def _section(resolved: dict[str, Any], name: str) -> dict[str, Any]:
    section = resolved.get(name, {})
    if not isinstance(section, dict):
        raise ConfigError(f"{name} ({section!r}) in the DeepSpeed JSON must be a JSON object: write it in braces")
    return section


def _refuse_auto(value: Any, path: str) -> None:
    if value == "auto":
        raise ConfigError(f'{path} in the DeepSpeed JSON is "auto", but no setting of eve_ds defines it: give a value')
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_auto(item, f"{path}.{key}" if path else key)

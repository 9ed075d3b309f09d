"""Reconcile DeepSpeed's JSON with the YAML: batch triangle, precision, clipping, optimizer, expert parallelism."""

from __future__ import annotations

import copy
import importlib.util
import math
from typing import Any

from deepspeed.accelerator import get_accelerator

from eve_ds.config import Config, ConfigError
from eve_ds.log import get_logger
from eve_ds.objectives.registry import objectives_of
from eve_ds.parallel.deepspeed_json.blocks import (
    compare_optimizer,
    compare_scheduler,
    describe_optimizer,
    describe_scheduler,
)
from eve_ds.parallel.deepspeed_json.check import JSON, Problems, check_keys
from eve_ds.parallel.deepspeed_json.shared import SharedSettings, contradiction
from eve_ds.parallel.deepspeed_json.values import show
from eve_ds.parallel.deepspeed_json.zero_values import settle_zero
from eve_ds.parallel.refused import (
    check_clipping,
    check_compile,
    check_megatron,
    check_tensor_parallel,
    check_topology,
)

BATCH = {
    "train_batch_size": "train_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
}
"""Batch sizes of the JSON -> fields of the YAML's section `train`."""
MONITOR_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
"""Monitors -> packages that they need."""


def resolve_deepspeed_config(
    deepspeed_config: dict[str, Any], config: Config, world_size: int
) -> tuple[Config, dict[str, Any]]:
    """Reconcile the DeepSpeed JSON with the YAML.

    A value that is "auto" or absent in the JSON is taken from the YAML, and means DeepSpeed's default where the YAML
    has no such setting. A value that only the JSON sets is taken into the configuration. A value that both set must be
    equal. Values of the JSON without effect are logged; :mod:`eve_ds.parallel.deepspeed_json.keys` lists all keys.

    Args:
        deepspeed_config: content of the JSON; not changed.
        config: settings of the YAML.
        world_size: number of ranks.

    Returns:
        The configuration with batch triangle, precision, clipping, optimizer and ep_size settled, and the JSON as
        :func:`eve_ds.parallel.engine.initialize_engine` takes it: without "auto" and without keys that have no effect.

    Raises:
        ConfigError: everything that is wrong with the JSON, in the order of its keys: unknown keys, values of another
            type, refused features, contradictions with the YAML (each names both places), batch sizes that do not fit,
            a topology that is refused.
    """
    if not isinstance(deepspeed_config, dict):
        raise ConfigError(f"the DeepSpeed JSON must be a mapping of settings, not a {type(deepspeed_config).__name__}")
    problems = Problems(deepspeed_config)
    settings, notes = check_keys(deepspeed_config, problems)
    resolved = copy.deepcopy(settings)
    shared = SharedSettings(config, problems)
    notes += _take_shared(resolved, shared)
    _rename(resolved, problems)
    precision = _precision(resolved, shared)
    stage = 1 if problems.below("zero_optimization.stage") else 0  # 1: a bad stage shall not cause further problems
    zero = resolved["zero_optimization"] = {"stage": stage, **resolved.get("zero_optimization", {})}
    notes += settle_zero(resolved, precision, problems)
    _check_monitors(resolved, problems)
    settled = _settle_run(shared, precision, zero["stage"], world_size)
    with problems.collect():
        check_megatron(config.parallel.tp_size)
        check_tensor_parallel(config, zero["stage"], "data_types" in resolved)
    problems.raise_all()
    for note in notes:
        get_logger().info(note)
    train = settled.train
    return settled, resolved | {
        "train_batch_size": train.train_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "gradient_clipping": settled.optimizer.clip_grad_norm,
        "bf16": {**resolved.get("bf16", {}), "enabled": precision == "bf16"},
        "fp16": {**resolved.get("fp16", {}), "enabled": precision == "fp16"},
        "steps_per_print": resolved.get("steps_per_print", 10**9),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _take_shared(resolved: dict[str, Any], shared: SharedSettings) -> list[str]:
    """Take batch sizes, clipping and the blocks; return a line about each block, which is removed."""
    for key, field in BATCH.items():
        if key in resolved:
            shared.take(key, resolved[key], "train", field)
    if "gradient_clipping" in resolved:
        shared.take("gradient_clipping", resolved["gradient_clipping"], "optimizer", "clip_grad_norm")
    notes = []
    for name, compare, describe in (
        ("optimizer", compare_optimizer, describe_optimizer),
        ("scheduler", compare_scheduler, describe_scheduler),
    ):
        block = resolved.pop(name, None)
        if block is not None:
            compare(block, shared)
            notes.append(describe(shared))
    return notes


def _settle_run(shared: SharedSettings, precision: str, stage: int, world_size: int) -> Config:
    """Configuration with everything settled; rules that several settings break together become problems."""
    problems, config = shared.problems, shared.config
    clip = float(shared.get("optimizer", "clip_grad_norm"))
    tp_size = config.parallel.tp_size
    data_size = max(world_size // tp_size, 1)
    ep_size = config.parallel.ep_size or math.gcd(data_size, config.model.moe.num_experts)
    train = {"train_batch_size": shared.get("train", "train_batch_size"), "precision": precision}
    if not any(problems.below(key) for key in BATCH):
        with problems.collect():
            train["micro_batch_size"], train["gradient_accumulation_steps"] = _batch(shared, data_size)
    if not any(problems.below(key) for key in ("bf16", "fp16")):
        with problems.collect():
            _check_precision(precision, stage, clip)
    with problems.collect("zero_optimization.stage"):
        check_compile(config.train.compile, stage)
    with problems.collect():
        check_topology(
            world_size=world_size,
            num_experts=config.model.moe.num_experts,
            ep_size=ep_size,
            zero_stage=stage,
            clip_grad_norm=clip,
            tp_size=tp_size,
            overlap=config.parallel.overlap,
        )
    return shared.settled(train=train, optimizer={"clip_grad_norm": clip}, parallel={"ep_size": ep_size})


def batch_triangle(batch: int, micro: int | None, accumulation: int | None, data_size: int) -> tuple[int, int]:
    """Micro-batch size and accumulation steps such that batch = micro * accumulation * data_size.

    Raises:
        ConfigError: no such whole numbers exist.
    """
    rule = (
        f"train_batch_size ({batch}) must equal micro_batch_size ({micro or 'free'}) * "
        f"gradient_accumulation_steps ({accumulation or 'free'}) * data ranks ({data_size})"
    )
    if micro is None and accumulation is None:
        accumulation = 1
    if micro is None:
        micro = batch // (data_size * (accumulation or 1))
    if accumulation is None:
        accumulation = batch // (data_size * micro)
    if micro * accumulation * data_size != batch or micro < 1:
        raise ConfigError(f"{rule}: leave one of them out, or change train_batch_size to a multiple of the others")
    return micro, accumulation


def _batch(shared: SharedSettings, data_size: int) -> tuple[int, int]:
    """Micro-batch size and accumulation steps; the objectives may need several pairs in a micro-batch."""
    batch, micro, accumulation = (shared.get("train", field) for field in BATCH.values())
    micro, accumulation = batch_triangle(batch, micro, accumulation, data_size)
    model = shared.config.model
    min_pairs = max(objective.min_pairs for objective in objectives_of(model))
    if micro < min_pairs:
        raise ConfigError(
            f"model.objectives ({', '.join(model.objectives)}) needs a micro_batch_size ({micro}) of "
            f"{min_pairs} or more, since it compares the pairs of a micro-batch: raise train.micro_batch_size"
        )
    return micro, accumulation


def _rename(resolved: dict[str, Any], problems: Problems) -> None:
    """Give old keys their present names: `bfloat16`, and `cpu_offload` and `cpu_offload_param` of ZeRO."""
    if "bfloat16" in resolved:
        old = resolved.pop("bfloat16")
        if resolved.setdefault("bf16", old) != old:
            problems.add("bfloat16", f"bfloat16 {JSON} is the former name of bf16, which differs: remove it")
    zero = resolved.get("zero_optimization", {})
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        if not zero.pop(old, False):
            continue
        offload = zero.setdefault(new, {})
        if offload.setdefault("device", "cpu") != "cpu":
            problems.add(
                f"zero_optimization.{old}",
                f"zero_optimization.{old} (true) {JSON} is the former name of {new}.device "
                f'"cpu", which differs ({show(offload["device"])}): remove it',
            )


def _precision(resolved: dict[str, Any], shared: SharedSettings) -> str:
    problems, train = shared.problems, shared.config.train
    wanted = {name: resolved.get(name, {}).get("enabled") for name in ("bf16", "fp16")}
    if all(wanted.values()):
        problems.add("fp16.enabled", f"bf16.enabled and fp16.enabled {JSON} are both true: turn one of them off")
    chosen = next((name for name, enabled in wanted.items() if enabled), None)
    explicit = shared.is_explicit("train", "precision")
    if chosen is not None:
        if explicit and train.precision != chosen:
            path = f"{chosen}.enabled"
            problems.add(path, contradiction("train.precision", train.precision, path, True))
        return chosen
    if wanted.get(train.precision) is False:
        if explicit:
            path = f"{train.precision}.enabled"
            problems.add(path, contradiction("train.precision", train.precision, path, False))
        return "fp32"
    return train.precision


def _check_monitors(resolved: dict[str, Any], problems: Problems) -> None:
    """Refuse monitors whose package is not installed."""
    for name, package in MONITOR_PACKAGES.items():
        if resolved.get(name, {}).get("enabled") and importlib.util.find_spec(package) is None:
            problems.add(
                f"{name}.enabled",
                f"{name}.enabled (true) {JSON} needs the package {package}, which is not installed: run "
                f"pip install {package}, or set it to false",
            )


def _check_precision(precision: str, stage: int, clip: float) -> None:
    accelerator = get_accelerator()
    supported = {"bf16": accelerator.is_bf16_supported(), "fp16": accelerator.is_fp16_supported(), "fp32": True}
    if not supported[precision]:
        raise ConfigError(
            f"precision {precision} cannot be used on this device ({accelerator.device_name()}): take another one of "
            f"{', '.join(name for name in supported if supported[name])}"
        )
    check_clipping(precision, stage, clip)

"""Refuse combinations of ranks, experts, shards and settings that would fail late or compute something else."""

from __future__ import annotations

import importlib.util
import math

from eve_ds.config import Config, ConfigError, check_experts_per_rank


def check_topology(
    *,
    world_size: int,
    num_experts: int,
    ep_size: int,
    zero_stage: int,
    clip_grad_norm: float,
    tp_size: int = 1,
    overlap: int = 1,
) -> None:
    """Check how experts are to be spread before anything is built.

    Args:
        world_size: ranks of the run.
        num_experts: experts of a layer.
        ep_size: ranks that share one full set of experts.
        zero_stage: `zero_optimization.stage` of the DeepSpeed JSON, 0 to 3.
        clip_grad_norm: largest gradient norm, 0 = no clipping.
        tp_size: ranks that share the matrices of each layer.
        overlap: parts of the exchange of an MoE layer.

    Raises:
        ConfigError: the topology breaks a rule; the message has the value, the rule and the remedy.
    """
    if world_size % tp_size:
        raise ConfigError(
            f"the number of ranks ({world_size}) must be divisible by parallel.tp_size ({tp_size}), since consecutive "
            f"ranks share the matrices of each layer: start a multiple of {tp_size} ranks, or take a smaller tp_size"
        )
    data_size = world_size // tp_size
    sizes = ", ".join(str(size) for size in range(1, data_size + 1) if math.gcd(num_experts, data_size) % size == 0)
    check_experts_per_rank(num_experts, ep_size)
    if data_size % ep_size:
        ranks = f"ranks ({world_size})" if tp_size == 1 else f"ranks ({world_size}) over parallel.tp_size ({tp_size})"
        raise ConfigError(
            f"the number of {ranks} must be divisible by parallel.ep_size ({ep_size}), since every "
            f"expert-parallel group holds one full set of experts: start a multiple of {ep_size * tp_size} ranks, or "
            f"take one of {sizes} as ep_size"
        )
    if ep_size > 1 and overlap > num_experts // ep_size:
        raise ConfigError(
            f"parallel.overlap ({overlap}) must be at most the number of experts of a rank ({num_experts // ep_size}), "
            f"model.moe.num_experts ({num_experts}) / parallel.ep_size ({ep_size}), since every part has whole "
            "experts: take fewer parts, or a smaller ep_size"
        )
    if zero_stage == 0 and ep_size > 1 and clip_grad_norm > 0:
        raise ConfigError(
            f"optimizer.clip_grad_norm ({clip_grad_norm:g}) cannot be used with zero_optimization.stage 0 and "
            f"parallel.ep_size ({ep_size}): ranks hold different experts, and DeepSpeed at stage 0 clips by the "
            "average of the ranks' gradient norms, which is not the norm of the whole gradient: use a higher stage, "
            "where it is, or clip_grad_norm=0"
        )


def check_clipping(precision: str, zero_stage: int, clip_grad_norm: float) -> None:
    """Refuse to clip at ZeRO 0 in bf16 or fp16; the arguments are those of :func:`check_topology`.

    Raises:
        ConfigError: the message has the value, the rule and the remedy.
    """
    if precision != "fp32" and zero_stage == 0 and clip_grad_norm > 0:
        raise ConfigError(
            f"optimizer.clip_grad_norm ({clip_grad_norm:g}) cannot be used with precision {precision} and "
            "zero_optimization.stage 0, where DeepSpeed leaves the experts out of the gradient norm: use a higher "
            "stage, or clip_grad_norm=0"
        )


def check_megatron(tp_size: int) -> None:
    """Raise ConfigError if `tp_size` ranks share tensors and megatron-core is not installed."""
    if tp_size > 1 and not (importlib.util.find_spec("megatron") and importlib.util.find_spec("megatron.core")):
        raise ConfigError(
            f"parallel.tp_size ({tp_size}) needs the package megatron-core, which is not installed: run pip install "
            "--no-deps megatron-core==0.16.1 (its dependencies are not needed), or set tp_size=1"
        )


def check_tensor_parallel(config: Config, zero_stage: int, accumulates_in_fp32: bool) -> None:
    """Check that the layers can be cut for `parallel.tp_size` ranks; nothing to check if it is 1.

    Args:
        config: settings of the YAML.
        zero_stage: `zero_optimization.stage` of the DeepSpeed JSON.
        accumulates_in_fp32: whether micro-steps are summed in fp32 although the model computes in less.

    Raises:
        ConfigError: a size is not divisible, or a setting does not combine with it.
    """
    tp_size = config.parallel.tp_size
    if tp_size == 1:
        return
    check_cuts(config, tp_size)
    if config.train.compile != "none":
        raise ConfigError(
            f"train.compile ({config.train.compile}) cannot be used with parallel.tp_size ({tp_size}), whose blocks "
            "sum over ranks and make no single graph: set train.compile=none"
        )
    if accumulates_in_fp32 and zero_stage == 1:
        raise ConfigError(
            "data_types.grad_accum_dtype (fp32) in the DeepSpeed JSON cannot be used with zero_optimization.stage 1 "
            f"and parallel.tp_size ({tp_size}): use stage 2, or remove it"
        )
    if config.parallel.split_experts and zero_stage == 3:
        raise ConfigError(
            "parallel.split_experts cannot be used with zero_optimization.stage 3, where DeepSpeed takes the norm of "
            "the experts' gradients over the data ranks only: use stage 1 or 2, or split_experts=false"
        )


def check_cuts(config: Config, tp_size: int) -> None:
    """Raise ConfigError if `tp_size` ranks cannot hold equal parts of the layers."""
    for name, size in _cut_sizes(config).items():
        if size % tp_size:
            raise ConfigError(
                f"model.{name} ({size}) must be divisible by parallel.tp_size ({tp_size}), since tensor-parallel ranks "
                f"hold equal parts of it: take another tp_size, or change model.{name}"
            )


def _cut_sizes(config: Config) -> dict[str, int]:
    """Sizes that are cut, by name in `model`. Widths are multiples of the numbers of heads; a vocabulary is padded."""
    model = config.model
    sizes = {"num_attention_heads": model.num_attention_heads, "intermediate_size": model.intermediate_size}
    if model.predicts_pixels and config.task is None:
        sizes["pixel_decoder.num_attention_heads"] = model.pixel_decoder.num_attention_heads
    return sizes


def check_compile(compiled: str, zero_stage: int) -> None:
    """Check that no blocks are compiled at ZeRO 3.

    Args:
        compiled: `train.compile` of the YAML.
        zero_stage: `zero_optimization.stage` of the DeepSpeed JSON.

    Raises:
        ConfigError: they are; the message has the value, the rule and the remedy.
    """
    if zero_stage == 3 and compiled != "none":
        raise ConfigError(
            f"train.compile ({compiled}) cannot be used with zero_optimization.stage 3, which gathers the weights of "
            "each module while it runs: use stage 1 or 2, or train.compile=none"
        )

"""Refuse combinations of ranks, experts and DeepSpeed settings that would fail late or compute something else."""

from __future__ import annotations

import math

from eve_ds.config import ConfigError, check_experts_per_rank


def check_topology(
    *,
    world_size: int,
    num_experts: int,
    ep_size: int,
    zero_stage: int,
    clip_grad_norm: float,
) -> None:
    """Check how experts are to be spread before anything is built.

    Args:
        world_size: ranks of the run.
        num_experts: experts of a layer.
        ep_size: ranks that share one full set of experts.
        zero_stage: `zero_optimization.stage` of the DeepSpeed JSON, 0 to 3.
        clip_grad_norm: largest gradient norm, 0 = no clipping.

    Raises:
        ConfigError: the topology breaks a rule; the message has the value, the rule and the remedy.
    """
    sizes = ", ".join(str(size) for size in range(1, world_size + 1) if math.gcd(num_experts, world_size) % size == 0)
    check_experts_per_rank(num_experts, ep_size)
    if world_size % ep_size:
        raise ConfigError(
            f"the number of ranks ({world_size}) must be divisible by parallel.ep_size ({ep_size}), since every "
            f"expert-parallel group holds one full set of experts: start a multiple of {ep_size} ranks, or take one of "
            f"{sizes} as ep_size"
        )
    if zero_stage == 0 and ep_size > 1 and clip_grad_norm > 0:
        raise ConfigError(
            f"optimizer.clip_grad_norm ({clip_grad_norm:g}) cannot be used with zero_optimization.stage 0 and "
            f"parallel.ep_size ({ep_size}): ranks hold different experts, and DeepSpeed at stage 0 clips by the "
            "average of the ranks' gradient norms, which is not the norm of the whole gradient: use stage 1 or 2, "
            "where it is, or clip_grad_norm=0"
        )


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

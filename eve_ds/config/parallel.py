"""Section `parallel`: sharing of experts and of tensors among ranks."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from eve_ds.config.section import ConfigError, Section


class ParallelConfig(Section):
    """Expert and tensor parallelism."""

    ep_size: Annotated[int, Field(ge=0)] = 1
    """Number of ranks that share one full set of experts; must divide `model.moe.num_experts`. 0: the largest number
    that divides both the data-parallel ranks and the experts."""
    tp_size: Annotated[int, Field(ge=1)] = 1
    """Number of consecutive ranks that share the matrices of each layer and compute the same samples together. Above 1
    it needs megatron-core. Commands that run one process ignore it."""
    split_experts: bool = False
    """Whether tensor-parallel ranks share each expert; otherwise each of them holds and computes its experts whole."""
    overlap: Annotated[int, Field(ge=1)] = 1
    """Number of parts in which an MoE layer exchanges the rows of its experts, so that a part travels while another is
    computed; at most the number of experts of a rank. 1: no overlap. Results are the same to the last bit."""
    hierarchical: bool = False
    """Whether rows travel within each node first and then between nodes, with fewer and larger messages. Every
    expert-parallel group must have equally many ranks on each of its nodes. Results are the same to the last bit."""


def check_experts_per_rank(num_experts: int, ep_size: int) -> None:
    """Raise ConfigError if `ep_size` ranks cannot hold equally many of `num_experts` experts."""
    if num_experts % ep_size:
        divisors = ", ".join(str(size) for size in range(1, num_experts + 1) if num_experts % size == 0)
        raise ConfigError(
            f"model.moe.num_experts ({num_experts}) must be divisible by parallel.ep_size ({ep_size}), since every "
            f"rank of an expert-parallel group holds equally many experts: take one of {divisors} as ep_size"
        )

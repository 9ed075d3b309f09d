"""Bytes that a rank hands to each collective in one optimizer step.

N elements of b bytes that a rank computes with (dense ones, or experts), A micro-steps:

- ZeRO 0 and 1 sum all gradients once a step: all-reduce b N. ZeRO 1 then gathers the new weights: all-gather b N.
- ZeRO 2 sums them in every micro-step: all-reduce A b N, since DeepSpeed reduces whole buckets and keeps its part.
- ZeRO 3 sums them in every micro-step: reduce-scatter A b N. It gathers the weights once a step: all-gather b N. If
  they exceed `max_live_parameters`, it gathers them in every pass, at most: all-gather 2 A b N.
- Every MoE layer sends its rows to the experts and back, in both passes, and in a recomputed forward pass. Numbers of
  rows and the sums for load balancing are sent once.
- Tensor parallelism sums the outputs of layers cut by rows and the input gradients of layers cut by columns.

The sums of norms, losses and contrastive features are left out: they take a few bytes to a few kilobytes a sample.
"""

from __future__ import annotations

from typing import NamedTuple

from eve_ds.config import ModelConfig
from eve_ds.planner.parameters import Held
from eve_ds.planner.shape import Shape


class Passes(NamedTuple):
    """Bytes of tensors in one micro-batch that ranks exchange if they share experts or tensors."""

    expert_rows: int
    """Input rows of the experts, summed over the MoE layers; their output has the same size."""
    expert_calls: int
    """Number of times that experts run in a forward pass."""
    views: int
    """Views that are balanced separately."""
    block_sums: int
    """Sums over tensor-parallel ranks in the forward pass of the blocks."""
    other_sums: int
    """The same outside of the blocks."""
    gradient_sums: int
    """Sums over tensor-parallel ranks in the backward pass."""


class Collective(NamedTuple):
    """All calls of one kind and purpose in a step."""

    purpose: str
    kind: str
    """`all_reduce`, `all_gather`, `reduce_scatter` or `all_to_all`."""
    ranks: int
    """Number of ranks of the group."""
    spans_nodes: bool
    num_bytes: int
    """Bytes of the tensor: the whole one of a gather or scatter, the input of the other kinds."""

    @property
    def sent(self) -> int:
        """Bytes that a rank sends: with a ring, (n - 1) / n of the tensor, twice for a sum; its own rows stay."""
        return self.num_bytes * (2 if self.kind == "all_reduce" else 1) * (self.ranks - 1) // self.ranks


def collectives(held: Held, passes: Passes, model: ModelConfig, shape: Shape) -> list[Collective]:
    """List the collectives of one optimizer step of one rank; those of groups of one rank are left out."""
    data = shape.data_size, shape.spans_nodes(shape.data_size, shape.tp_size)
    stride = shape.ep_size * shape.tp_size
    replicas = shape.expert_replicas, shape.spans_nodes(shape.expert_replicas, stride)
    experts = shape.ep_size, shape.spans_nodes(shape.ep_size, shape.tp_size)
    tensors = shape.tp_size, shape.spans_nodes(shape.tp_size, 1)
    runs = shape.accumulation_steps * (2 if shape.checkpointing else 1)  # of the forward pass of a block
    backward = shape.accumulation_steps
    layers = len(model.expert_layers)
    statistics = 4 * (2 * model.moe.num_experts + 1) * passes.views * layers * shape.accumulation_steps
    found = [
        *_of_parameters("dense", shape.element * held.dense, data, shape, held),
        *_of_parameters("expert", shape.element * held.experts, replicas, shape, held),
        Collective("expert rows", "all_to_all", *experts, 2 * passes.expert_rows * (runs + backward)),
        Collective(
            "row counts",
            "all_to_all",
            *experts,
            8 * model.moe.num_experts * passes.expert_calls * shape.accumulation_steps,
        ),
        Collective("balance statistics", "all_reduce", *data, statistics),
        Collective(
            "tensor-parallel sums",
            "all_reduce",
            *tensors,
            passes.block_sums * runs + (passes.other_sums + passes.gradient_sums) * backward,
        ),
    ]
    return [one for one in found if one.ranks > 1 and one.num_bytes]


def _of_parameters(which: str, size: int, group: tuple[int, bool], shape: Shape, held: Held) -> list[Collective]:
    """Collectives of `size` bytes of parameters that `group` replicates or partitions."""
    gradients, weights = f"{which} gradients", f"{which} weights"
    steps = shape.accumulation_steps
    if shape.zero_stage == 3:
        gathers = 1 if held.all <= shape.max_live_parameters else 2 * steps
        return [
            Collective(gradients, "reduce_scatter", *group, size * steps),
            Collective(weights, "all_gather", *group, size * gathers),
        ]
    reduced = Collective(gradients, "all_reduce", *group, size * (steps if shape.zero_stage == 2 else 1))
    return [reduced] if shape.zero_stage == 0 else [reduced, Collective(weights, "all_gather", *group, size)]

"""Part of a parameter whose fp32 masters and moments this rank holds, by ZeRO stage.

ZeRO 1 and 2 concatenate the parameters of a group and split the result evenly over ranks. ZeRO 3 cuts each parameter on
its own: every rank of the parameter's process group gets an equal part of it, and the last ranks get padding behind its
end. The optimizer concatenates the parts of a sub-group of parameters, padding included, into one flat tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn


class Part(NamedTuple):
    """Range of a parameter in a tensor that torch's optimizer updates; without padding."""

    masters: Tensor
    """fp32 tensor that the optimizer updates; key of its state."""
    offset: int
    """First element of the range in the flat `masters`."""
    start: int
    """First element of the range in the parameter, in row-major order."""
    numel: int
    """Number of elements; 0 if this rank holds nothing of the parameter."""


class Place(NamedTuple):
    """Place of a parameter in the flat weights that ZeRO 1 and 2 split over ranks."""

    group: int
    """Number of the parameter group."""
    offset: int
    """First element in the flat weights of the group."""


def places(engine: DeepSpeedEngine) -> dict[nn.Parameter, Place]:
    """Place of every parameter at ZeRO 1 and 2, in the order that `round_robin_gradients` may have changed."""
    optimizer = engine.optimizer
    groups = zip(optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets, strict=True)
    return {
        parameter: Place(number, offset)
        for number, (parameters, offsets) in enumerate(groups)
        for parameter, offset in zip(parameters, offsets, strict=True)
    }


def part_of_partition(engine: DeepSpeedEngine, place: Place, numel: int) -> Part:
    """Part of a parameter with `numel` elements at ZeRO 1 and 2."""
    partition = engine.optimizer.single_partition_of_fp32_groups[place.group]
    rank = dist.get_rank(engine.optimizer.real_dp_process_group[place.group])
    before = place.offset - rank * partition.numel()  # the parameter's first element, counted from the partition's
    start, stop = max(0, -before), min(numel, partition.numel() - before)
    return Part(partition, before + start, start, max(0, stop - start))


def part_at_stage_3(engine: DeepSpeedEngine, parameter: Any) -> Part:
    """Part of a parameter at ZeRO 3, whose attributes DeepSpeed has set."""
    optimizer = engine.optimizer
    sub_group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = parameter.ds_zero_partition_rank * size
    numel = max(0, min(size, parameter.ds_numel - start))
    return Part(optimizer.fp32_partitioned_groups_flat[sub_group], offset, start, numel)


def whole_numel(parameter: nn.Parameter) -> int:
    """Number of elements of a parameter; ZeRO 3 leaves the parameter itself empty."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


@torch.no_grad()
def update_weights_at_stage_3(engine: DeepSpeedEngine) -> None:
    """Copy the masters, which were changed, to the weights that ZeRO 3 gathers; collective.

    As in DeepSpeed's step, weights that are gathered at the moment are given back first.
    """
    optimizer = engine.optimizer
    optimizer._partition_all_parameters()
    pairs = zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True)
    for sub_group, (weights, masters) in enumerate(pairs):
        weights.data.copy_(masters.data)
        optimizer._unflatten_partitioned_parameters(sub_group)

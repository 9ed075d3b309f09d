"""Sum of balance statistics over the ranks that share one load-balancing loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor


class SumOverRanks(torch.autograd.Function):
    """All-reduce for a loss that every rank then computes and weighs identically.

    The backward returns the gradient of this rank's loss with respect to its own summand, times the number of ranks.
    DeepSpeed then averages parameter gradients over ranks, which leaves the gradient of one such loss of the whole
    batch.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Sum over the ranks of `group`, in the shape of `values`."""
        ctx.num_ranks = dist.get_world_size(group)
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient in the same shape."""
        return gradient * ctx.num_ranks, None


def sum_over_data_parallel(values: Tensor) -> Tensor:
    """Sum over all data-parallel ranks, in the shape of `values`; differentiable, see :class:`SumOverRanks`."""
    return SumOverRanks.apply(values, groups._get_data_parallel_group())

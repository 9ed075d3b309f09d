"""Rows of all data-parallel ranks, through which gradients flow back."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor


class GatherRows(torch.autograd.Function):
    """All-gather; backward sums what the losses of all ranks say about this rank's rows.

    Where every rank's loss is a mean over its own rows and parameter gradients are averaged over ranks, as DeepSpeed
    does, what comes out is the gradient of the mean over the rows of all ranks.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        """(B, D), B alike on all ranks -> (R * B, D) in rank order."""
        ctx.group, ctx.num_rows = group, len(rows)
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, rows.contiguous(), group=group)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """(R * B, D) -> (B, D)."""
        total = gradient.clone()
        dist.all_reduce(total, group=ctx.group)
        return total.narrow(0, dist.get_rank(ctx.group) * ctx.num_rows, ctx.num_rows), None


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Rows of all data-parallel ranks, each of which brings as many, and the number of this rank's first; collective.

    (B, D) -> (R * B, D), which has gradients, and an offset.
    """
    group = groups._get_data_parallel_group()
    return GatherRows.apply(rows, group), dist.get_rank(group) * len(rows)

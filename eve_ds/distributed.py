"""Rank of this process, collectives and seeds; depends on torch only.

Every function also works in a world of one without a process group. :mod:`eve_ds.process_group` joins the group.
"""

from __future__ import annotations

import os
import random
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def rank_zero() -> bool:
    """Whether this process is the one that logs and writes: rank 0, or the only one."""
    return rank_of_process() == 0


def rank_of_process() -> int:
    """Rank of this process in the group, or in the launcher's variable before the group exists."""
    return dist.get_rank() if _in_group() else int(os.environ.get("RANK", "0"))


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def all_reduce_sum(values: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Sum of `values` over the ranks of `group` (default: all), as a new tensor of the same shape, dtype and device."""
    total = values.detach().clone()
    if not _in_group():
        return total
    if dist.get_backend(group) == "nccl" and not total.is_cuda:
        total = total.cuda()
    dist.all_reduce(total, group=group)
    return total.to(values.device)


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Values of the ranks of `group` (default: all) in rank order, on each of them; transferred by pickle."""
    if not _in_group():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def gather_rows(rows: torch.Tensor, tp_size: int = 1) -> tuple[torch.Tensor, int]:
    """Gather the rows of all data ranks with gradients, and the index of this rank's first row among them; collective.

    (N, D), with the same N on all ranks -> (data ranks * N, D) in rank order. `tp_size` consecutive ranks hold the same
    rows, which are taken once. The backward gives each rank's rows the sum over data ranks of the gradients of their
    losses. If each loss is a mean over its rank's rows, and parameter gradients are averaged over ranks as DeepSpeed
    does, the result is the gradient of the mean over all rows.
    """
    if not _in_group() or dist.get_world_size() == tp_size:
        return rows, 0
    return _GatherRows.apply(rows, tp_size), dist.get_rank() // tp_size * len(rows)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, tp_size: int) -> torch.Tensor:
        ctx.shape, ctx.tp_size = rows.shape, tp_size
        gathered = rows.new_empty(dist.get_world_size(), *rows.shape)
        dist.all_gather_into_tensor(gathered.flatten(0, 1), rows.contiguous())
        return gathered[::tp_size].flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        by_rank = gradient.contiguous().view(dist.get_world_size() // ctx.tp_size, *ctx.shape)
        if ctx.tp_size > 1:  # each of these ranks has the gradient of the loss that they share
            by_rank = (by_rank / ctx.tp_size).repeat_interleave(ctx.tp_size, dim=0)
        own = gradient.new_empty(ctx.shape)
        dist.reduce_scatter_tensor(own, by_rank.flatten(0, 1))
        return own, None


def broadcast_object(value: T, source: int = 0, group: dist.ProcessGroup | None = None) -> T:
    """Value of rank `source`, on every rank of `group` (default: all); transferred by pickle.

    The `value` of other ranks is ignored.
    """
    if not _in_group():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source, group=group)
    return box[0]


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed Python's and torch's default generators (CPU and CUDA), differently for every (seed, rank).

    Plain `seed + rank` would give rank 1 of seed 0 the numbers of rank 0 of seed 1. Seeds count modulo 2**43, since
    torch takes 64 bits.
    """
    combined = ((seed % 2**43) << 20) + rank
    random.seed(combined)
    # Not `torch.manual_seed`: without CUDA it stores a stack trace for later use, which costs 5 ms per training step.
    torch.default_generator.manual_seed(combined)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(combined)

"""Experts of one rank behind the all-to-all of their expert-parallel group.

Rows of the expert buffer travel to the rank of their expert and back:

    buffer (R, D), packed or in slots by expert = by owner  --all-to-all-->  rows by (source, local expert)
    --reorder-->  by (local expert, source)  --experts-->  same order  --reorder, all-to-all-->  buffer (R, D)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eve_ds.model.experts import Experts

Sizes = list[list[int]]
"""Row counts to send [to rank][expert of that rank], or to receive [from rank][expert of this rank]."""
_HOST_GROUPS: dict[dist.ProcessGroup, dist.ProcessGroup] = {}
"""Gloo group of each expert-parallel group; DeepSpeed keeps the latter for the life of the process."""


def _host_group(group: dist.ProcessGroup, ep_size: int) -> dist.ProcessGroup:
    """Gloo group of the same consecutive ranks; the first call for a group is a collective of all ranks."""
    if ep_size == 1 or dist.get_backend(group) == "gloo":
        return group
    if group not in _HOST_GROUPS:
        _HOST_GROUPS[group], _ = dist.new_subgroups(ep_size, backend="gloo")
    return _HOST_GROUPS[group]


class ShardedExperts(nn.Module):
    """Experts of this rank behind the all-to-all; checkpoint code expects the names down to `deepspeed_experts`."""

    def __init__(self, experts: Experts, ep_size: int) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({"deepspeed_experts": experts})
        self.ep_size = ep_size
        self.ep_group: dist.ProcessGroup | None = None
        self.host_group: dist.ProcessGroup | None = None
        """Gloo group of the same ranks, for numbers in host memory."""

    def _set_ep_group(self, group: dist.ProcessGroup) -> None:  # upstream's MoE calls this name
        self.ep_group = group
        self.host_group = _host_group(group, self.ep_size)

    def forward(self, rows: Tensor, rows_per_expert: Tensor, has_slots: bool = False) -> Tensor:
        """Expert buffer (R, D) and (E,) int64 rows of each expert in it -> (R, D) outputs.

        With `has_slots`, every expert has the same number of rows. The host then knows how many rows this rank sends,
        and gets the numbers of the other ranks from their hosts. Otherwise the host waits for the device.
        """
        experts = self.experts["deepspeed_experts"]
        if self.ep_size == 1:
            return experts(rows, rows_per_expert)
        if self.ep_group is None:
            raise RuntimeError(
                f"experts are spread over {self.ep_size} ranks, but the layer has no expert-parallel group yet: "
                "pass the model to deepspeed.initialize first, or call set_deepspeed_parallelism() on its MoE layers"
            )
        exchange = self._exchange_slots if has_slots else self._exchange_sizes
        send, receive, own_sizes = exchange(rows_per_expert, rows.shape[0])
        sent, received = [sum(row) for row in send], [sum(row) for row in receive]
        by_source = ExchangeRows.apply(rows, sent, received, sum(received), self.ep_group)
        per_expert = [list(sources) for sources in zip(*receive, strict=True)]
        done = experts(transpose_blocks(by_source, receive), own_sizes)
        by_source = transpose_blocks(done, per_expert)
        return ExchangeRows.apply(by_source, received, sent, rows.shape[0], self.ep_group)

    def _exchange_sizes(self, rows_per_expert: Tensor, num_rows: int) -> tuple[Sizes, Sizes, Tensor]:
        """(E,) int64 rows of each expert -> sizes to send, sizes to receive, (E / ep,) int64 rows of own experts."""
        sizes = rows_per_expert.new_empty(2, self.ep_size, rows_per_expert.numel() // self.ep_size)
        sizes[0] = rows_per_expert.view_as(sizes[0])
        dist.all_to_all_single(sizes[1], sizes[0], group=self.ep_group)
        send, receive = sizes.tolist()  # the only time that the host waits for the device
        return send, receive, sizes[1].sum(dim=0)

    def _exchange_slots(self, rows_per_expert: Tensor, num_rows: int) -> tuple[Sizes, Sizes, Tensor]:
        """Same as :meth:`_exchange_sizes` if every expert has the same share of the `num_rows` rows."""
        num_experts = rows_per_expert.numel()
        slots = torch.empty(self.ep_size, dtype=torch.int64)
        dist.all_gather_into_tensor(slots, torch.tensor([num_rows // num_experts]), group=self.host_group)
        of_rank: list[int] = slots.tolist()
        num_local = num_experts // self.ep_size
        send = [[num_rows // num_experts] * num_local] * self.ep_size
        receive = [[own] * num_local for own in of_rank]
        return send, receive, rows_per_expert.new_full((num_local,), sum(of_rank))


def transpose_blocks(rows: Tensor, sizes: list[list[int]]) -> Tensor:
    """Reorder blocks of rows from (i, j) to (j, i) order: (N, D) -> (N, D); block (i, j) has `sizes[i][j]` rows."""
    blocks = rows.split([size for row in sizes for size in row])
    width = len(sizes[0])
    return torch.cat([blocks[i * width + j] for j in range(width) for i in range(len(sizes))])


class ExchangeRows(torch.autograd.Function):
    """All-to-all of rows over a process group; the backward sends the gradients in the opposite direction."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], num_rows: int, group: dist.ProcessGroup
    ) -> Tensor:
        """Send the first `sum(sent)` rows of (R, D) and return (num_rows, D): the received rows, then zeros.

        Args:
            ctx: autograd's context.
            rows: rows grouped by destination rank.
            sent, received: numbers of rows to and from each rank of the group.
            num_rows: length of the result, at least `sum(received)`.
            group: process group of the exchange.
        """
        ctx.sent, ctx.received, ctx.num_rows, ctx.group = sent, received, rows.shape[0], group
        return _exchange(rows, sent, received, num_rows, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        """(num_rows, D) -> (R, D), zero for rows that were not sent."""
        return _exchange(gradient, ctx.received, ctx.sent, ctx.num_rows, ctx.group), None, None, None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int], num_rows: int, group: dist.ProcessGroup) -> Tensor:
    out = rows.new_zeros(num_rows, rows.shape[1])
    dist.all_to_all_single(out[: sum(received)], rows[: sum(sent)].contiguous(), received, sent, group=group)
    return out

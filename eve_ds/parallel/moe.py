"""Mixture-of-experts layer whose experts live on the ranks of DeepSpeed's expert-parallel group.

The layer is a `deepspeed.moe.layer.MoE`, so that the engine, its gradient clipping and its checkpoints find it. Router
and arithmetic come from :mod:`eve_ds.model.moe`. Rows of the expert buffer travel to the rank of their expert and back:

    buffer (R, D), packed or in slots by expert = by owner  --all-to-all-->  rows by (source, local expert)
    --reorder-->  by (local expert, source)  --experts-->  same order  --reorder, all-to-all-->  buffer (R, D)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE as UpstreamMoE
from deepspeed.utils import groups
from torch import Tensor, nn

from eve_ds.config import ConfigError, ModelConfig, check_experts_per_rank
from eve_ds.model.experts import Experts
from eve_ds.model.moe import MoEOutput, Router, is_dropless, mix_experts, moe_output, packs_views
from eve_ds.topology import Topology

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


class DeepSpeedMoE(UpstreamMoE):
    """MoE layer with `num_experts / ep_size` of its experts on this rank.

    Pass `functools.partial(DeepSpeedMoE, ep_size=...)` as the `moe_cls` of :class:`eve_ds.model.eve.EVE`.

    The forward is a collective of the expert-parallel group. In training, if the load-balancing loss is taken over all
    data-parallel ranks, it is also a collective of those. Every rank must therefore call it equally often, but ranks
    may have different numbers of tokens. The loss balances the tokens of one micro-step; micro-steps are averaged.
    """

    def __init__(self, config: ModelConfig, ep_size: int = 1, ep_rank: int | None = None) -> None:
        """Create the experts of this rank.

        Args:
            config: architecture.
            ep_size: number of ranks that share one full set of experts.
            ep_rank: index of this rank among them. None means that consecutive ranks share a set, DeepSpeed's default.

        Raises:
            ConfigError: the number of experts is not divisible by `ep_size`.
        """
        num_experts = config.moe.num_experts
        check_experts_per_rank(num_experts, ep_size)
        # The engine reads attributes that upstream's constructor sets. Its gate and experts are minimal and replaced.
        super().__init__(hidden_size=1, expert=nn.Identity(), num_experts=num_experts, ep_size=ep_size)
        if ep_rank is None:
            ep_rank = Topology.current(ep_size).expert_rank
        self.ep_rank = ep_rank
        self.first_expert = ep_rank * self.num_local_experts
        self.is_compilable = ep_size == 1
        self.balance_over_ranks = config.moe.balance_over == "data_parallel"
        self.config = config
        self.router = Router(config)
        experts = Experts(self.num_local_experts, config.hidden_size, config.intermediate_size)
        for parameter in experts.parameters():  # the marks that upstream's Experts sets
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = self.expert_group_name  # type: ignore[attr-defined]
        self.deepspeed_moe = ShardedExperts(experts, ep_size)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Create the process groups, or reuse the groups that another layer has created; called by the engine.

        Raises:
            ConfigError: the group assigns experts to this rank that differ from those it initialized.
        """
        super().set_deepspeed_parallelism(use_data_before_expert_parallel_)
        rank = dist.get_rank(self.deepspeed_moe.ep_group)
        if rank != self.ep_rank:
            raise ConfigError(
                f"this rank holds the experts of expert-parallel rank {self.ep_rank}, but is number {rank} of its "
                "group: leave use_data_before_expert_parallelism off, or pass DeepSpeedMoE the ep_rank of the layout"
            )

    def forward(
        self,
        hidden_states: Tensor,
        modality_ids: Tensor,
        attention_mask: Tensor | None = None,
        view_sizes: Sequence[int] | None = None,
    ) -> MoEOutput:
        """(..., D), (...) int64, (...) bool or None -> MoEOutput; see :meth:`eve_ds.model.moe.MoE.forward`."""
        return self.output(*self.mix(hidden_states, modality_ids, attention_mask, view_sizes))

    def mix(
        self,
        hidden_states: Tensor,
        modality_ids: Tensor,
        attention_mask: Tensor | None,
        view_sizes: Sequence[int] | None,
    ) -> tuple[Tensor, ...]:
        """See :meth:`eve_ds.model.moe.MoE.mix`; a collective of the expert-parallel group."""
        experts = partial(self.deepspeed_moe, has_slots=not is_dropless(self.config, self.training))
        one_pass = packs_views(self.config, self.training)
        return mix_experts(self.router, hidden_states, modality_ids, attention_mask, experts, view_sizes, one_pass)

    def output(self, hidden_states: Tensor, balance: Tensor, *others: Tensor) -> MoEOutput:
        """See :meth:`eve_ds.model.moe.MoE.output`; a collective of all data-parallel ranks if they balance jointly."""
        if self.training and self.balance_over_ranks and dist.is_initialized():
            balance = _sum_over_data_parallel(balance)
        return moe_output(hidden_states, balance, *others)


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


def _sum_over_data_parallel(values: Tensor) -> Tensor:
    return SumOverRanks.apply(values, groups._get_data_parallel_group())

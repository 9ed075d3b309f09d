"""Router, experts and forward of an MoE layer on several ranks; what the layers of all ZeRO stages share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eve_ds.config import ConfigError, ModelConfig, check_experts_per_rank
from eve_ds.model.experts import Experts
from eve_ds.model.moe import MoEOutput, Peers, Router, is_dropless, mix_experts, moe_output, packs_views
from eve_ds.parallel.exchange.sharded_experts import ExpertRun, ShardedExperts, Slots
from eve_ds.parallel.experts.balance import sum_over_data_parallel
from eve_ds.topology import Topology


class RoutedExperts(nn.Module):
    """Base of the MoE layers with `num_experts / ep_size` of their experts on this rank.

    :meth:`mix` is a collective of the expert-parallel group. In training, if the load-balancing loss is taken over all
    data-parallel ranks, :meth:`outputs` is a collective of those. Every rank must therefore call them equally often,
    but ranks may have different numbers of tokens. The loss balances the tokens of one micro-step; micro-steps are
    averaged.
    """

    def add_experts(self, config: ModelConfig, ep_size: int, ep_rank: int | None) -> None:
        """Create the router and the experts of this rank, after the constructor of the upstream class has run.

        Args:
            config: architecture.
            ep_size: number of ranks that share one full set of experts.
            ep_rank: index of this rank among them. None means that consecutive ranks share a set.

        Raises:
            ConfigError: the number of experts is not divisible by `ep_size`.
        """
        check_experts_per_rank(config.moe.num_experts, ep_size)
        num_local = config.moe.num_experts // ep_size
        self.ep_rank = Topology.current(ep_size).expert_rank if ep_rank is None else ep_rank
        self.first_expert = self.ep_rank * num_local
        self.is_compilable = ep_size == 1
        self.balance_over_ranks = config.moe.balance_over == "data_parallel"
        self.config = config
        self.router = Router(config)
        self.deepspeed_moe = ShardedExperts(Experts(num_local, config.hidden_size, config.intermediate_size), ep_size)

    def check_expert_rank(self) -> None:
        """Check that this rank's place in its expert-parallel group is the one whose experts it holds.

        Raises:
            ConfigError: the group assigns experts to this rank that differ from those it initialized.
        """
        rank = dist.get_rank(self.deepspeed_moe.ep_group)
        if rank != self.ep_rank:
            raise ConfigError(
                f"this rank holds the experts of expert-parallel rank {self.ep_rank}, but is number {rank} of its "
                "group: leave use_data_before_expert_parallelism off, or pass the layer the ep_rank of the layout"
            )

    def forward(
        self,
        hidden_states: Tensor,
        modality_ids: Tensor,
        attention_mask: Tensor | None = None,
        view_sizes: Sequence[int] | None = None,
    ) -> MoEOutput:
        """(..., D), (...) int64, (...) bool or None -> MoEOutput; see :meth:`eve_ds.model.moe.MoE.forward`."""
        return self.outputs([self.mix(hidden_states, modality_ids, attention_mask, view_sizes)])[0]

    def mix(
        self,
        hidden_states: Tensor,
        modality_ids: Tensor,
        attention_mask: Tensor | None,
        view_sizes: Sequence[int] | None,
        peers: Peers | None = None,
    ) -> tuple[Tensor, ...]:
        """See :meth:`eve_ds.model.moe.MoE.mix`; a collective of the expert-parallel group."""
        one_pass = packs_views(self.config, self.training)
        arguments = (self.router, hidden_states, modality_ids, attention_mask)
        if self.deepspeed_moe.ep_size == 1:
            return mix_experts(*arguments, self.deepspeed_moe, view_sizes, one_pass)
        slots = None
        if not is_dropless(self.config, self.training):
            slots = self._slots([modality_ids.numel()] if view_sizes is None else view_sizes, peers)
        sizes = None if peers is None else peers.sizes
        run = ExpertRun(self.deepspeed_moe, slots, {} if sizes is None else sizes)
        return mix_experts(*arguments, run.apply, view_sizes, one_pass, run.announce)

    def _slots(self, tokens: Sequence[int], peers: Peers | None) -> list[Slots]:
        """Slots by view, from this rank's `tokens` by view and those of its peers as far as they are known."""
        of_group = [None] * len(tokens) if peers is None else peers.tokens
        return [
            Slots(self.router.slots(own), None if others is None else [self.router.slots(count) for count in others])
            for own, others in zip(tokens, of_group, strict=True)
        ]

    def outputs(self, mixed: Sequence[Sequence[Tensor]]) -> list[MoEOutput]:
        """See :meth:`eve_ds.model.moe.MoE.outputs`; a collective of all data-parallel ranks if they balance jointly.

        One exchange serves all layers of the model: nobody needs the sums before the loss.
        """
        balances = torch.stack([balance for _, balance, *_ in mixed])
        if self.training and self.balance_over_ranks and dist.is_initialized():
            balances = sum_over_data_parallel(balances)
        return [
            moe_output(hidden_states, balance, *others)
            for (hidden_states, _, *others), balance in zip(mixed, balances.unbind(), strict=True)
        ]

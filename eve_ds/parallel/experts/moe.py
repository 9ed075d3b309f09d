"""Mixture-of-experts layer whose experts live on the ranks of DeepSpeed's expert-parallel group.

The layer is a `deepspeed.moe.layer.MoE`, so that the engine, its gradient clipping and its checkpoints find it. Router
and arithmetic come from :mod:`eve_ds.model.moe`.
"""

from __future__ import annotations

from deepspeed.moe.layer import MoE as UpstreamMoE
from torch import nn

from eve_ds.config import ModelConfig, check_experts_per_rank
from eve_ds.parallel.experts.routed_experts import RoutedExperts


class DeepSpeedMoE(RoutedExperts, UpstreamMoE):
    """MoE layer for ZeRO 0 to 2 with `num_experts / ep_size` of its experts on this rank.

    Pass `functools.partial(DeepSpeedMoE, ep_size=...)` as the `moe_cls` of :class:`eve_ds.model.eve.EVE`.
    """

    def __init__(self, config: ModelConfig, ep_size: int = 1, ep_rank: int | None = None) -> None:
        """Create the experts of this rank; see :meth:`RoutedExperts.add_experts` for the arguments and errors."""
        check_experts_per_rank(config.moe.num_experts, ep_size)
        # The engine reads attributes that upstream's constructor sets. Its gate and experts are minimal and replaced.
        super().__init__(hidden_size=1, expert=nn.Identity(), num_experts=config.moe.num_experts, ep_size=ep_size)
        self.add_experts(config, ep_size, ep_rank)
        for parameter in self.deepspeed_moe.parameters():  # the marks that upstream's Experts sets
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = self.expert_group_name  # type: ignore[attr-defined]

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Create the process groups, or reuse the groups that another layer has created; called by the engine.

        Raises:
            ConfigError: the group assigns experts to this rank that differ from those it initialized.
        """
        super().set_deepspeed_parallelism(use_data_before_expert_parallel_)
        self.check_expert_rank()

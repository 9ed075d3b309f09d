"""Mixture-of-experts layer whose parameters ZeRO 3 partitions.

DeepSpeed's engine refuses its own MoE layer at stage 3, but takes the layer of its AutoEP: it partitions the experts
over the ranks that hold the same ones, averages their gradients over all ranks, and counts them in the gradient norm.
AutoEP's own experts have another architecture (gated, without biases), so only its class and its marks are used.
"""

from __future__ import annotations

from typing import Any

from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import nn

from eve_ds.config import ModelConfig
from eve_ds.parallel.experts.routed_experts import RoutedExperts


class Stage3MoE(RoutedExperts, AutoEPMoELayer):
    """MoE layer for ZeRO 3 with `num_experts / ep_size` of its experts on this rank, before they are partitioned.

    Pass `functools.partial(Stage3MoE, ep_size=...)` as the `moe_cls` of :class:`eve_ds.model.eve.EVE`.
    """

    def __init__(self, config: ModelConfig, ep_size: int = 1, ep_rank: int | None = None) -> None:
        """Create the experts of this rank; see :meth:`RoutedExperts.add_experts` for the arguments and errors."""
        nn.Module.__init__(self)  # AutoEP's constructor would convert a layer of a known language model
        self.add_experts(config, ep_size, ep_rank)
        self.num_experts = config.moe.num_experts
        self.num_local_experts = self.num_experts // ep_size
        self.ep_size = ep_size
        self.ep_group_name = f"ep_size_{ep_size}"
        self.ep_group: Any = None
        self.folding_group_handles = None
        for parameter in self.deepspeed_moe.parameters():  # the marks that AutoEP's constructor sets
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = self.ep_group_name  # type: ignore[attr-defined]
            parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
            parameter.ds_zero_partition_group_name = self.ep_group_name  # type: ignore[attr-defined]

    def set_deepspeed_parallelism(
        self, use_data_before_expert_parallel_: bool = False, folding_group_handles: None = None
    ) -> None:
        """Create the process groups, or reuse the groups that another layer has created; called by the engine.

        Raises:
            ConfigError: the group assigns experts to this rank that differ from those it initialized.
        """
        super().set_deepspeed_parallelism(use_data_before_expert_parallel_, folding_group_handles)
        self.deepspeed_moe._set_ep_group(self.ep_group)
        self.check_expert_rank()

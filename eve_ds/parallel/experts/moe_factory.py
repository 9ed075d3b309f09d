"""Choice of the MoE layer by ZeRO stage: the one place that knows which engine takes which layer."""

from __future__ import annotations

from functools import partial

from eve_ds.model.eve import MoEFactory
from eve_ds.parallel.experts.moe import DeepSpeedMoE
from eve_ds.parallel.experts.moe_stage3 import Stage3MoE
from eve_ds.topology import Topology


def moe_factory(zero_stage: int, topology: Topology) -> MoEFactory:
    """Return what makes the MoE layers of a model for the engine, as `moe_cls` of :class:`eve_ds.model.eve.EVE`.

    Args:
        zero_stage: `zero_optimization.stage` of the resolved DeepSpeed JSON, 0 to 3.
        topology: decides which experts this rank holds.
    """
    layer = Stage3MoE if zero_stage == 3 else DeepSpeedMoE
    return partial(layer, ep_size=topology.ep_size, ep_rank=topology.expert_rank)

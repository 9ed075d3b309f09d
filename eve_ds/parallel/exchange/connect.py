"""Process groups of the exchange, shared by all MoE layers of a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import nn

from eve_ds.config import ParallelConfig
from eve_ds.parallel.exchange.paths import TwoLevelPath
from eve_ds.parallel.exchange.sharded_experts import ShardedExperts
from eve_ds.parallel.nodes import ranks_per_node
from eve_ds.topology import Topology


def connect_experts(
    model: nn.Module, parallel: ParallelConfig, topology: Topology, nodes: Sequence[int] | None
) -> None:
    """Set overlap, path and host group of every layer with experts on several ranks; collective of all ranks.

    Args:
        model: model whose layers have their expert-parallel group, as after `deepspeed.initialize`.
        parallel: settings, which :func:`eve_ds.parallel.nodes.check_expert_groups` has passed.
        topology: ranks and groups.
        nodes: node of each rank; None = not known.
    """
    layers = [module for module in model.modules() if isinstance(module, ShardedExperts) and module.ep_size > 1]
    if not layers:
        return
    group, host_group = layers[0].ep_group, layers[0].host_group
    assert group is not None
    groups = topology.expert_groups
    if host_group is None:
        host_group = _own_group(groups, "gloo")
    path = None
    if parallel.hierarchical and nodes is not None:
        path = _two_level_path(group, groups, nodes)
    for layer in layers:
        layer.num_parts, layer.host_group = parallel.overlap, host_group
        layer.path = path or layer.path


def _two_level_path(
    group: dist.ProcessGroup, groups: Sequence[Sequence[int]], nodes: Sequence[int]
) -> TwoLevelPath | None:
    """Path by node; None if every group has one node, or one rank on each: one all-to-all sends the same then."""
    shapes = [ranks_per_node(ranks, nodes) for ranks in groups]
    if all(len(counts) == 1 or max(counts) == 1 for counts in shapes):
        return None
    in_node, across = [], []
    for ranks, (width, *_) in zip(groups, shapes, strict=True):
        in_node += [list(ranks[start : start + width]) for start in range(0, len(ranks), width)]
        across += [list(ranks[place::width]) for place in range(width)]
    own_node, own_place = _own_group(in_node), _own_group(across)
    assert own_node is not None
    assert own_place is not None
    return TwoLevelPath(group, own_node, own_place)


def _own_group(groups: Sequence[Sequence[int]], backend: str | None = None) -> dist.ProcessGroup | None:
    """Create the groups on all ranks; return the one of this rank."""
    own = None
    for ranks in groups:
        made = dist.new_group(list(ranks), backend=backend)
        own = made if dist.get_rank() in ranks else own
    return own

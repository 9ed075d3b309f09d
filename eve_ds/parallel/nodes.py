"""Nodes of the ranks, and the expert-parallel groups that lie on several of them."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from itertools import groupby

import torch.distributed as dist

from eve_ds.config import ConfigError, ParallelConfig
from eve_ds.log import get_logger
from eve_ds.topology import Topology


def nodes_of_run() -> list[int] | None:
    """Node of each rank, numbered from 0; None if ranks of one node are not consecutive; collective of all ranks."""
    places: list[tuple[str, int]] = [("", 0)] * dist.get_world_size()
    dist.all_gather_object(places, (socket.gethostname(), int(os.environ["LOCAL_RANK"])))
    return nodes_of(places)


def nodes_of(places: Sequence[tuple[str, int]]) -> list[int] | None:
    """Node of each rank, from its host and its rank on the node; see :func:`nodes_of_run`.

    Two nodes may have one host: a machine can play several nodes.
    """
    nodes: list[int] = []
    last_host, last_rank = "", 0
    for host, local_rank in places:
        if local_rank == 0:
            nodes.append(nodes[-1] + 1 if nodes else 0)
        elif nodes and host == last_host and local_rank == last_rank + 1:
            nodes.append(nodes[-1])
        else:
            return None
        last_host, last_rank = host, local_rank
    return nodes


def ranks_per_node(group: Sequence[int], nodes: Sequence[int]) -> list[int]:
    """Number of ranks of a group on each of its nodes."""
    return [len(list(ranks)) for _, ranks in groupby(nodes[rank] for rank in group)]


def check_expert_groups(parallel: ParallelConfig, topology: Topology, nodes: Sequence[int] | None) -> None:
    """Warn of groups that lie on several nodes without need.

    Args:
        parallel: settings of the exchange.
        topology: ranks and groups.
        nodes: result of :func:`nodes_of_run`.

    Raises:
        ConfigError: `parallel.hierarchical`, and some group does not have equally many ranks on each of its nodes.
    """
    if topology.ep_size == 1:
        return
    if nodes is None:
        if parallel.hierarchical:
            raise ConfigError(
                "parallel.hierarchical (true) needs the ranks of a node to be consecutive, and here they are not: "
                "start with --distribution=block (srun), or leave it out"
            )
        return
    for group in topology.expert_groups:
        counts = ranks_per_node(group, nodes)
        if parallel.hierarchical and len(set(counts)) > 1:
            raise ConfigError(
                f"parallel.hierarchical (true) needs equally many ranks of an expert-parallel group on each node, and "
                f"ranks {_named(group)} are {' + '.join(map(str, counts))} on {len(counts)} nodes: start a multiple of "
                f"{topology.ep_size * topology.tp_size} ranks, or a divisor of it, on each node (sbatch "
                "--ntasks-per-node), or leave it out"
            )
    _warn_of_nodes(topology, nodes)


def _warn_of_nodes(topology: Topology, nodes: Sequence[int]) -> None:
    """Log a warning, on rank 0, if a group that would fit on one node lies on several."""
    needed, largest = topology.ep_size * topology.tp_size, max(nodes.count(node) for node in set(nodes))
    spread = [group for group in topology.expert_groups if len(ranks_per_node(group, nodes)) > 1]
    if spread and needed <= largest and topology.rank == 0:
        get_logger().warning(
            "the expert-parallel group of ranks %s lies on %d nodes, so its rows cross the network in every MoE layer, "
            "although %d ranks fit on a node: start a multiple of %d ranks on each node (sbatch --ntasks-per-node)",
            _named(spread[0]),
            len(ranks_per_node(spread[0], nodes)),
            needed,
            needed,
        )


def _named(group: Sequence[int]) -> str:
    return ", ".join(map(str, group)) if len(group) <= 8 else f"{group[0]} to {group[-1]}"

"""Nodes of ranks: which expert-parallel groups lie on several, what is refused, and what is warned of."""

import logging

import pytest

from eve_ds.config import ConfigError, ParallelConfig
from eve_ds.log import get_logger
from eve_ds.parallel.nodes import check_expert_groups, nodes_of, ranks_per_node
from eve_ds.topology import Topology


def places(*nodes, host="{}"):
    """Places of ranks on nodes with these numbers of ranks; every node is a host of its own."""
    return [(host.format(node), rank) for node, ranks in enumerate(nodes) for rank in range(ranks)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (places(2, 2), [0, 0, 1, 1]),
        (places(2, 2, host="one"), [0, 0, 1, 1]),
        (places(3, 1, 2), [0, 0, 0, 1, 2, 2]),
        (places(1), [0]),
        ([("a", 0), ("b", 0), ("a", 1), ("b", 1)], None),
        ([("a", 0), ("b", 0), ("a", 1)], None),
        ([("a", 1), ("a", 0)], None),
    ],
)
def test_node_of_each_rank_is_known_if_ranks_of_a_node_are_consecutive(given, expected):
    assert nodes_of(given) == expected


def test_ranks_of_a_group_are_counted_by_node():
    assert ranks_per_node([1, 3, 5, 7], [0, 0, 0, 0, 1, 1, 1, 1]) == [2, 2]


def warned(parallel, topology, nodes):
    """Warnings of the check."""
    lines, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    get_logger().addHandler(handler)
    try:
        check_expert_groups(parallel, topology, nodes)
    finally:
        get_logger().removeHandler(handler)
    return lines


def test_groups_on_several_nodes_without_need_are_warned_of():
    assert warned(ParallelConfig(), Topology(5, 12, 4), nodes_of(places(6, 6))) == [], "rank 0 warns for all"
    (line,) = warned(ParallelConfig(), Topology(0, 12, 4), nodes_of(places(6, 6)))
    assert line == (
        "the expert-parallel group of ranks 4, 5, 6, 7 lies on 2 nodes, so its rows cross the network in every MoE "
        "layer, although 4 ranks fit on a node: start a multiple of 4 ranks on each node (sbatch --ntasks-per-node)"
    )


@pytest.mark.parametrize(
    ("topology", "nodes"),
    [
        (Topology(0, 4, 1), [0, 0, 1, 1]),
        (Topology(0, 4, 2), [0, 0, 1, 1]),
        (Topology(0, 4, 4), [0, 0, 1, 1]),
        (Topology(0, 4, 4), None),
    ],
)
def test_groups_that_fit_or_need_several_nodes_are_not_warned_of(topology, nodes):
    assert warned(ParallelConfig(), topology, nodes) == []


def test_uneven_nodes_are_refused_for_the_hierarchical_exchange():
    parallel = ParallelConfig(hierarchical=True)
    check_expert_groups(parallel, Topology(0, 4, 4), [0, 0, 1, 1])
    check_expert_groups(parallel, Topology(0, 4, 1), [0, 0, 0, 1])
    with pytest.raises(ConfigError) as caught:
        check_expert_groups(parallel, Topology(0, 4, 4), [0, 0, 0, 1])
    assert str(caught.value) == (
        "parallel.hierarchical (true) needs equally many ranks of an expert-parallel group on each node, and ranks "
        "0, 1, 2, 3 are 3 + 1 on 2 nodes: start a multiple of 4 ranks, or a divisor of it, on each node (sbatch "
        "--ntasks-per-node), or leave it out"
    )
    with pytest.raises(ConfigError, match="needs the ranks of a node to be consecutive, and here they are not: start"):
        check_expert_groups(parallel, Topology(0, 4, 4), None)

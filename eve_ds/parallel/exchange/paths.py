"""Paths of rows from rank to rank: all at once, or first within each node and then between nodes.

Rows leave in the order (destination rank, its experts) and arrive in the order (experts, source rank), whatever the
path: experts see the same rows in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch.distributed as dist
from torch import Tensor

from eve_ds.parallel.exchange.sizes import Sizes, SizesOnTheirWay
from eve_ds.parallel.exchange.steps import Send, Step, Table, transposed


class Path(Protocol):
    """Way of the rows of one expert-parallel group."""

    def start_counts(self, counts: Tensor) -> SizesOnTheirWay:
        """Start the exchange of (E,) int64 rows that this rank has for each expert; collective."""

    def sizes_of_all(self, counts: Table, own: Tensor) -> Sizes:
        """Sizes from the rows that each rank of the group has for each of E experts, and those of the own experts."""

    def steps(self, sizes: Sizes, experts: slice) -> list[Step]:
        """Steps of the rows for a part of every rank's experts."""


class DirectPath(NamedTuple):
    """One all-to-all over the whole group."""

    group: dist.ProcessGroup

    def start_counts(self, counts: Tensor) -> SizesOnTheirWay:
        """See :class:`Path`. Each rank sends every other rank the counts of that rank's experts."""
        buffer = counts.new_empty(2, self.group.size(), counts.numel() // self.group.size())
        buffer[0] = counts.view_as(buffer[0])
        work = dist.all_to_all_single(buffer[1], buffer[0], group=self.group, async_op=True)
        return SizesOnTheirWay(self, buffer, work)

    def sizes(self, counts: list[list[list[int]]], buffer: Tensor) -> Sizes:
        """See :class:`eve_ds.parallel.exchange.sizes.CountReader`."""
        send, receive = counts
        return Sizes(send, receive, (), buffer[1].sum(dim=0))

    def sizes_of_all(self, counts: Table, own: Tensor) -> Sizes:
        """See :class:`Path`."""
        rank = self.group.rank()
        return Sizes(_by_rank(counts[rank], len(counts)), [_by_rank(c, len(counts))[rank] for c in counts], (), own)

    def steps(self, sizes: Sizes, experts: slice) -> list[Step]:
        """See :class:`Path`."""
        send, receive = _summed(sizes.send, experts), _summed(sizes.receive, experts)
        arrived = [row[experts] for row in sizes.receive]
        return [Send(self.group, send, receive, sum(send), sum(receive)), *transposed(arrived)]


class TwoLevelPath(NamedTuple):
    """All-to-all within each node, to the rank with the place of the destination on its node, and then between nodes.

    A rank sends one message to each node instead of one to each rank of that node; every row is sent twice.
    """

    group: dist.ProcessGroup
    """The whole expert-parallel group: `num_nodes` times as many ranks as `in_node` has, node by node."""
    in_node: dist.ProcessGroup
    """Ranks of the group on this node."""
    across: dist.ProcessGroup
    """Ranks of the group with the same place on their nodes, in the order of the nodes."""

    def start_counts(self, counts: Tensor) -> SizesOnTheirWay:
        """See :class:`Path`. Every rank gets the counts of all ranks."""
        buffer = counts.new_empty(self.group.size(), self.group.size(), counts.numel() // self.group.size())
        work = dist.all_gather_into_tensor(buffer.flatten(), counts, group=self.group, async_op=True)
        return SizesOnTheirWay(self, buffer, work)

    def sizes(self, counts: list[list[list[int]]], buffer: Tensor) -> Sizes:
        """See :class:`eve_ds.parallel.exchange.sizes.CountReader`."""
        return self._sizes(counts, buffer[:, self.group.rank()].sum(dim=0))

    def sizes_of_all(self, counts: Table, own: Tensor) -> Sizes:
        """See :class:`Path`."""
        return self._sizes([_by_rank(row, len(counts)) for row in counts], own)

    def _sizes(self, counts: Sequence[Table], own: Tensor) -> Sizes:
        rank, width, place = self.group.rank(), self.in_node.size(), self.in_node.rank()
        neighbors = counts[rank - place : rank - place + width]
        relayed = tuple(source[place::width] for source in neighbors)
        return Sizes(counts[rank], [source[rank] for source in counts], relayed, own)

    def steps(self, sizes: Sizes, experts: slice) -> list[Step]:
        """See :class:`Path`."""
        width, nodes = self.in_node.size(), self.across.size()
        send, receive = _summed(sizes.send, experts), _summed(sizes.receive, experts)
        relayed = [_summed(of_nodes, experts) for of_nodes in sizes.relayed]
        by_node = [send[node * width : (node + 1) * width] for node in range(nodes)]
        from_neighbors, to_nodes = [sum(row) for row in relayed], [sum(column) for column in zip(*relayed, strict=True)]
        to_places = [sum(column) for column in zip(*by_node, strict=True)]
        from_nodes = [sum(receive[node * width : (node + 1) * width]) for node in range(nodes)]
        return [
            *transposed(by_node),
            Send(self.in_node, to_places, from_neighbors, sum(send), sum(from_neighbors)),
            *transposed(relayed),
            Send(self.across, to_nodes, from_nodes, sum(to_nodes), sum(receive)),
            *transposed([row[experts] for row in sizes.receive]),
        ]


def _by_rank(counts: Sequence[int], num_ranks: int) -> list[Sequence[int]]:
    """Rows by expert -> by rank and its experts."""
    width = len(counts) // num_ranks
    return [counts[rank * width : (rank + 1) * width] for rank in range(num_ranks)]


def _summed(table: Table, experts: slice) -> list[int]:
    return [sum(row[experts]) for row in table]

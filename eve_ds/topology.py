"""Place of this process among the ranks of a run; determines its data, its experts and its shards of tensors.

Ranks are numbered so that tensor-parallel ranks lie next to each other, then expert-parallel ones: with E = `ep_size`
and T = `tp_size`, rank = (replica * E + expert_rank) * T + tensor_rank. Data, masks, seeds, shares of losses and
metrics depend on the data rank, which is the same for tensor-parallel ranks of one group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist


class Sizes(Protocol):
    """Sizes of the groups of ranks, as a configuration gives them."""

    ep_size: int
    tp_size: int


@dataclass(frozen=True)
class Topology:
    """Rank of this process and sizes of the groups; the default is a single process."""

    rank: int = 0
    world_size: int = 1
    ep_size: int = 1
    """Number of ranks that share one full set of experts."""
    tp_size: int = 1
    """Number of ranks that share one full set of tensors."""

    @classmethod
    def current(cls, ep_size: int = 1, tp_size: int = 1) -> Topology:
        """Return the topology of this process in its process group, or that of a single process without a group."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls(ep_size=ep_size, tp_size=tp_size)
        return cls(dist.get_rank(), dist.get_world_size(), ep_size, tp_size)

    @classmethod
    def of(cls, settings: Sizes) -> Topology:
        """Return the topology of this process with the sizes of the section `parallel` of a configuration."""
        return cls.current(settings.ep_size, settings.tp_size)

    @property
    def data_rank(self) -> int:
        """Index of this process's share of the data."""
        return self.rank // self.tp_size

    @property
    def data_size(self) -> int:
        """Number of shares of the data."""
        return self.world_size // self.tp_size

    @property
    def expert_rank(self) -> int:
        """Index of this process's share of the experts, which is `num_experts / ep_size` consecutive experts."""
        return self.data_rank % self.ep_size

    @property
    def expert_replica(self) -> int:
        """Index of the full set of experts that this process belongs to."""
        return self.data_rank // self.ep_size

    @property
    def num_expert_replicas(self) -> int:
        """Number of full sets of experts."""
        return self.data_size // self.ep_size

    @property
    def expert_peers(self) -> range:
        """Data ranks of the processes that hold one full set of experts together, this one among them."""
        first = self.data_rank - self.expert_rank
        return range(first, first + self.ep_size)

    @property
    def expert_groups(self) -> list[list[int]]:
        """Ranks of every expert-parallel group of the run: each has one full set of experts and one tensor rank."""
        size, stride = self.ep_size * self.tp_size, self.tp_size
        starts = [first + tensor for first in range(0, self.world_size, size) for tensor in range(stride)]
        return [list(range(start, start + size, stride)) for start in starts]

    @property
    def tensor_rank(self) -> int:
        """Index of this process's shard of every tensor that is sharded."""
        return self.rank % self.tp_size

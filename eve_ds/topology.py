"""Place of this process among the ranks of a run: which data, which experts, which shard of a tensor it works on.

Ranks are numbered so that tensor-parallel ranks lie next to each other, then expert-parallel ones: with E = `ep_size`
and T = `tp_size`, rank = (replica * E + expert_rank) * T + tensor_rank. Data, masks, seeds, shares of losses and
metrics go by the data rank, which tensor-parallel ranks have in common.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class Topology:
    """Ranks and sizes; the default is a single process."""

    rank: int = 0
    world_size: int = 1
    ep_size: int = 1
    """Ranks that share one full set of experts."""
    tp_size: int = 1
    """Ranks that share one full set of tensors."""

    @classmethod
    def current(cls, ep_size: int = 1, tp_size: int = 1) -> Topology:
        """Topology of this process in its process group, or of a single process without one."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls(ep_size=ep_size, tp_size=tp_size)
        return cls(dist.get_rank(), dist.get_world_size(), ep_size, tp_size)

    @property
    def data_rank(self) -> int:
        """Number of this process's share of the data."""
        return self.rank // self.tp_size

    @property
    def data_size(self) -> int:
        """Shares of the data."""
        return self.world_size // self.tp_size

    @property
    def expert_rank(self) -> int:
        """Number of this process's share of the experts: it holds `num_experts / ep_size` from this multiple on."""
        return self.data_rank % self.ep_size

    @property
    def expert_replica(self) -> int:
        """Number of the full set of experts that this process belongs to."""
        return self.data_rank // self.ep_size

    @property
    def num_expert_replicas(self) -> int:
        """Full sets of experts."""
        return self.data_size // self.ep_size

    @property
    def tensor_rank(self) -> int:
        """Number of this process's shard of every tensor that is cut."""
        return self.rank % self.tp_size

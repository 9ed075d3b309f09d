"""Numbers of tokens of the micro-batches of a step on the ranks that share one set of experts.

Experts with a capacity have a number of rows that follows from the number of tokens. Ranks that know each other's
tokens therefore exchange rows without asking for their number. The sum that starts a step carries the tokens along.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eve_ds.topology import Topology


class GroupTokens:
    """Place of every rank, micro-step and view in a vector that is summed over ranks.

    Args:
        views: names of the views whose tokens are counted, the same on all ranks; none: the vector is empty.
        topology: ranks, of which those of one tensor-parallel group have the same tokens.
        micro_steps: number of micro-batches of a step.
    """

    def __init__(self, views: Sequence[str], topology: Topology, micro_steps: int) -> None:
        self._views, self._topology, self._micro_steps = views, topology, micro_steps

    def own(self, micro_batches: Sequence[Any]) -> list[float]:
        """Return this rank's summand, which has zeros in the places of the other ranks."""
        width = self._micro_steps * len(self._views)
        vector = [0.0] * (self._topology.data_size * width)
        if micro_batches and self._topology.tensor_rank == 0:
            layouts: list[Mapping[str, Any]] = [batch.layouts or {} for batch in micro_batches if self._views]
            counts = [own[view].num_tokens if view in own else 0 for own in layouts for view in self._views]
            start = self._topology.data_rank * width
            vector[start : start + width] = counts
        return vector

    def of_group(self, vector: Sequence[float]) -> list[dict[str, tuple[int, ...]]]:
        """Return, for each micro-step, view -> tokens of each rank of this rank's group, from the sum over ranks."""
        group, number = self._topology.expert_peers, len(self._views)
        return [
            {
                view: tuple(int(vector[(rank * self._micro_steps + step) * number + place]) for rank in group)
                for place, view in enumerate(self._views)
            }
            for step in range(self._micro_steps)
        ]

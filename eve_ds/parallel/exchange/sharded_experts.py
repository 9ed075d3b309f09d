"""Experts of one rank behind the exchange of rows in their expert-parallel group.

Rows of the expert buffer travel to the rank of their expert and back, in one part or in several that overlap with the
experts (Tutel's and FasterMoE's pipelining, by expert instead of by token, so that every matrix product stays whole):

    buffer (R, D), packed or in slots by expert = by rank  --path-->  rows by (local expert, source rank)
    --experts-->  same order  --path, backwards-->  buffer (R, D)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eve_ds.parallel.exchange.departure import arrive, depart
from eve_ds.parallel.exchange.paths import DirectPath, Path
from eve_ds.parallel.exchange.sizes import Known, Sizes, SizesOfSlots
from eve_ds.parallel.exchange.steps import Trip, undone


class Slots(NamedTuple):
    """Number of rows of an expert with a capacity, which is the same for all experts."""

    own: int
    """Rows of this rank."""
    of_group: list[int] | None
    """Rows of each rank of the expert-parallel group; None = not known."""


class ShardedExperts(nn.Module):
    """Experts of this rank behind the exchange; checkpoint code expects the names down to `deepspeed_experts`."""

    def __init__(self, experts: nn.Module, ep_size: int) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({"deepspeed_experts": experts})
        self.ep_size = ep_size
        self.num_parts = 1
        """Number of parts of the exchange that overlap with the experts."""
        self.ep_group: dist.ProcessGroup | None = None
        self.path: Path | None = None
        self.host_group: dist.ProcessGroup | None = None
        """Gloo group of the same ranks, for numbers in host memory; None: the device exchanges them."""

    def _set_ep_group(self, group: dist.ProcessGroup) -> None:  # upstream's MoE calls this name
        self.ep_group, self.path = group, DirectPath(group)
        self.host_group = group if dist.get_backend(group) == "gloo" else None

    def announce(self, rows_per_expert: Tensor, slots: Slots | None) -> Known:
        """Tell the ranks of the group how many rows they will get; collective unless they know it.

        Args:
            rows_per_expert: (E,) int64 rows that this rank has for each expert.
            slots: rows of every expert, where all have equally many.
        """
        path = self._path()
        of_group = None if slots is None else self._of_group(slots)
        if of_group is None:
            return path.start_counts(rows_per_expert)
        own = rows_per_expert.new_full((rows_per_expert.numel() // self.ep_size,), sum(of_group))
        return SizesOfSlots(path.sizes_of_all([[count] * rows_per_expert.numel() for count in of_group], own))

    def _of_group(self, slots: Slots) -> list[int] | None:
        """Rows of an expert on each rank of the group, if need be from the hosts; None if only the devices can tell."""
        if slots.of_group is not None or self.host_group is None:
            return slots.of_group
        gathered = torch.empty(self.ep_size, dtype=torch.int64)
        dist.all_gather_into_tensor(gathered, torch.tensor([slots.own]), group=self.host_group)
        return gathered.tolist()

    def forward(self, rows: Tensor, sizes: Known | Tensor) -> Tensor:
        """Expert buffer (R, D) -> (R, D) outputs; collective of the expert-parallel group.

        Args:
            rows: rows by expert, then rows of no expert, whose outputs are zero.
            sizes: result of :meth:`announce`; if this rank has all experts, (E,) int64 rows of each expert.
        """
        experts = self.experts["deepspeed_experts"]
        if isinstance(sizes, Tensor):
            return experts(rows, sizes)
        known, path = sizes.read(), self._path()
        parts = _parts(len(known.receive[0]), self.num_parts)
        steps = [path.steps(known, part) for part in parts]
        if len(parts) == 1:
            steps[0][0] = steps[0][0]._replace(rows_before=len(rows))
        there, back = [Trip(way) for way in steps], [Trip(undone(way)) for way in steps]
        leaving = [depart(own, trip) for own, trip in zip(_cut(rows, known, parts), there, strict=True)]
        returning = []
        for part, ticket, trip, way_back in zip(parts, leaving, there, back, strict=True):
            done = experts(arrive(ticket, trip), _only(known.own, part))
            returning.append(depart(done, way_back))
        return _joined([arrive(*end) for end in zip(returning, back, strict=True)], known, parts, len(rows))

    def _path(self) -> Path:
        if self.path is None:
            raise RuntimeError(
                f"experts are spread over {self.ep_size} ranks, but the layer has no expert-parallel group yet: "
                "pass the model to deepspeed.initialize first, or call set_deepspeed_parallelism() on its MoE layers"
            )
        return self.path


class ExpertRun:
    """Experts during one forward of a layer: for each view, the numbers of rows are announced, then the rows follow.

    Args:
        experts: the experts behind the exchange.
        slots: by view; None if rows are packed.
        sizes: by view; a view that has its sizes here is not announced again.
    """

    def __init__(self, experts: ShardedExperts, slots: Sequence[Slots] | None, sizes: dict[int, Known]) -> None:
        self._experts, self._slots, self._sizes = experts, slots, sizes
        self._view = 0

    def announce(self, rows_per_expert: Tensor) -> None:
        """Announce the (E,) int64 rows of each expert of the next view."""
        if self._view not in self._sizes:
            slots = None if self._slots is None else self._slots[self._view]
            self._sizes[self._view] = self._experts.announce(rows_per_expert, slots)

    def apply(self, rows: Tensor, rows_per_expert: Tensor) -> Tensor:
        """(R, D) rows of the view that was announced -> (R, D) outputs."""
        sizes = self._sizes[self._view]
        self._view += 1
        return self._experts(rows, sizes)


def _parts(num_experts: int, num_parts: int) -> list[slice]:
    """Cut a rank's experts into parts of nearly equal size."""
    ends = [part * num_experts // num_parts for part in range(num_parts + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]


def _only(sizes: Tensor, part: slice) -> Tensor:
    """Sizes (N,) int64 of the experts of a part, 0 for the others: each part runs the whole module, as hooks expect."""
    if part == slice(0, len(sizes)):
        return sizes
    kept = torch.zeros_like(sizes)
    kept[part] = sizes[part]
    return kept


def _blocks(sizes: Sizes, parts: list[slice]) -> list[int]:
    """Numbers of rows by destination rank and part."""
    return [sum(row[part]) for row in sizes.send for part in parts]


def _cut(rows: Tensor, sizes: Sizes, parts: list[slice]) -> list[Tensor]:
    """Rows (R, D) by destination rank -> the rows of each part, by destination rank."""
    if len(parts) == 1:
        return [rows]
    blocks = _blocks(sizes, parts)
    split = rows.split([*blocks, len(rows) - sum(blocks)])
    return [torch.cat(split[number : len(blocks) : len(parts)]) for number in range(len(parts))]


def _joined(returned: list[Tensor], sizes: Sizes, parts: list[slice], num_rows: int) -> Tensor:
    """Inverse of :func:`_cut`: (num_rows, D), zero behind the last row of an expert."""
    if len(parts) == 1:
        return returned[0]
    blocks = _blocks(sizes, parts)
    split = [own.split(blocks[number :: len(parts)]) for number, own in enumerate(returned)]
    joined = [block for of_rank in zip(*split, strict=True) for block in of_rank]
    return torch.cat([*joined, returned[0].new_zeros(num_rows - sum(blocks), returned[0].shape[1])])

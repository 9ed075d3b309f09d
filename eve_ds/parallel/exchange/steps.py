"""Steps that move rows: reorder blocks of them, or send them to other ranks; every step can be undone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Table = Sequence[Sequence[int]]
"""Numbers of rows of blocks, by two indices."""


class Reorder(NamedTuple):
    """Puts blocks of rows into another order."""

    sizes: list[int]
    """Number of rows of each block, before the step."""
    order: list[int]
    """Block that comes to each place."""
    rows_before: int
    """Length of the buffer before the step. It may end with rows that are in no block: they are lost, and zero when the
    step is undone."""
    rows_after: int

    def run(self, rows: Tensor) -> Tensor:
        """(rows_before, D) -> (rows_after, D)."""
        blocks = rows[: sum(self.sizes)].split(self.sizes)
        parts = [blocks[place] for place in self.order]
        if (rest := self.rows_after - sum(self.sizes)) > 0:
            parts.append(rows.new_zeros(rest, rows.shape[1]))
        return torch.cat(parts)

    def undone(self) -> Reorder:
        """Return the step in the opposite direction."""
        places = sorted(range(len(self.order)), key=self.order.__getitem__)
        return Reorder([self.sizes[place] for place in self.order], places, self.rows_after, self.rows_before)


class Send(NamedTuple):
    """All-to-all of rows over a process group."""

    group: dist.ProcessGroup
    sent: list[int]
    """Number of rows for each rank of the group; they lie in the order of the ranks."""
    received: list[int]
    """Number of rows from each rank."""
    rows_before: int
    """Length of the buffer before the step, at least `sum(sent)`."""
    rows_after: int
    """Length of the buffer after the step; rows behind the received ones are zero."""

    def start(self, rows: Tensor) -> tuple[Tensor, dist.Work]:
        """(rows_before, D) -> (rows_after, D), which is complete when the work is."""
        out, end = rows.new_empty(self.rows_after, rows.shape[1]), sum(self.received)
        if end < self.rows_after:
            out[end:] = 0
        own = rows[: sum(self.sent)].contiguous()
        work = dist.all_to_all_single(out[:end], own, self.received, self.sent, group=self.group, async_op=True)
        return out, work

    def run(self, rows: Tensor) -> Tensor:
        """(rows_before, D) -> (rows_after, D)."""
        out, work = self.start(rows)
        work.wait()
        return out

    def undone(self) -> Send:
        """Return the step in the opposite direction."""
        return Send(self.group, self.received, self.sent, self.rows_after, self.rows_before)


Step = Reorder | Send


def transposed(sizes: Table) -> list[Step]:
    """Return the steps from blocks (i, j) to blocks (j, i): none if one index has one value, as nothing moves then."""
    height, width = len(sizes), len(sizes[0])
    if height == 1 or width == 1:
        return []
    flat = [size for row in sizes for size in row]
    order = [i * width + j for j in range(width) for i in range(height)]
    return [Reorder(flat, order, sum(flat), sum(flat))]


def undone(steps: Sequence[Step]) -> list[Step]:
    """Return the steps that take the rows back."""
    return [step.undone() for step in reversed(steps)]


class Trip:
    """Rows on their way through steps: everything up to the first all-to-all starts, the rest follows on arrival.

    Args:
        steps: steps there, with one all-to-all or more.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = {False: list(steps), True: undone(steps)}
        self._pending: tuple[list[Step], Tensor, Tensor, dist.Work] | None = None

    def start(self, rows: Tensor, back: bool = False) -> None:
        """Send rows (R, D) there, or `back`; collective."""
        steps = self._steps[back]
        first = next(place for place, step in enumerate(steps) if isinstance(step, Send))
        for step in steps[:first]:
            rows = step.run(rows)
        send = steps[first]
        assert isinstance(send, Send)
        out, work = send.start(rows)
        self._pending = steps[first + 1 :], rows, out, work  # the sent rows must live until they have arrived

    def arrive(self) -> Tensor:
        """Wait for the rows that were sent last; a collective of the steps that are left."""
        assert self._pending is not None
        steps, _, rows, work = self._pending
        self._pending = None
        work.wait()
        for step in steps:
            rows = step.run(rows)
        return rows

"""Numbers of rows that the ranks of an expert-parallel group send each other, as the host knows them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from eve_ds.parallel.exchange.steps import Table


class Sizes(NamedTuple):
    """Numbers of rows of one exchange."""

    send: Table
    """By destination rank and that rank's experts."""
    receive: Table
    """By source rank and this rank's experts."""
    relayed: tuple[Table, ...]
    """By source rank on this node, destination node and expert: rows for the rank of that node with this rank's place
    on its node. Empty if rows go to their rank directly."""
    own: Tensor
    """(experts of this rank,) int64 rows of each, on the device of the rows."""


class Known(Protocol):
    """Sizes that are there, or on their way."""

    def read(self) -> Sizes:
        """Return the sizes; waits for them at most once."""


class CountReader(Protocol):
    """Path of rows that can turn the content of a buffer of counts into sizes."""

    def sizes(self, counts: list[list[list[int]]], buffer: Tensor) -> Sizes:
        """Return the sizes in the exchanged counts, which are also in `buffer` on the device of the rows."""


class SizesOfSlots:
    """Sizes that are known without an exchange."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes

    def read(self) -> Sizes:
        """See :class:`Known`."""
        return self._sizes


class SizesOnTheirWay:
    """Counts whose exchange has started.

    On a CUDA device they are copied to page-locked memory on a stream of their own, so that the host waits for the
    exchange of the counts alone, and not for work that was queued after it.

    Args:
        path: interprets the counts.
        buffer: int64 counts on the device of the rows, complete when `work` is.
        work: exchange of the counts.
    """

    def __init__(self, path: CountReader, buffer: Tensor, work: dist.Work) -> None:
        self._path, self._buffer, self._work = path, buffer, work
        self._on_host, self._copied = buffer, None
        self._sizes: Sizes | None = None
        if buffer.is_cuda:
            self._copy()

    def _copy(self) -> None:
        stream = torch.cuda.Stream(self._buffer.device)
        with torch.cuda.stream(stream):
            self._work.wait()  # the stream waits, the host does not
            self._on_host = torch.empty(self._buffer.shape, dtype=torch.int64, pin_memory=True)
            self._on_host.copy_(self._buffer, non_blocking=True)
        self._copied = stream.record_event()

    def read(self) -> Sizes:
        """See :class:`Known`."""
        if self._sizes is None:
            if self._copied is None:
                self._work.wait()
            else:
                self._copied.synchronize()
            self._sizes = self._path.sizes(self._on_host.tolist(), self._buffer)
        return self._sizes

"""Batches on their way to a device: copied beside what it computes, before they are asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor


class Movable(Protocol):
    """A batch of any kind."""

    def tensors(self) -> Iterable[Tensor]:
        """Every tensor of it."""

    def to(self: B, device: torch.device, non_blocking: bool = False) -> B:
        """The same batch with every tensor on `device`."""


B = TypeVar("B", bound=Movable)


class DeviceQueue(Generic[B]):
    """First in, first out; what goes in lies anywhere, what comes out lies on the device.

    On a CUDA device copies begin as batches are put and run on a stream of their own. Neither `put` nor `get` makes the
    host wait if the batches are in page-locked memory. On a CPU there is nothing to copy.

    Args:
        device: where batches are used.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._batches: deque[tuple[B, torch.cuda.Event | None]] = deque()

    def put(self, batch: B) -> None:
        """Begin the copy of a batch."""
        if self._stream is None:
            self._batches.append((batch.to(self._device), None))
            return
        with torch.cuda.stream(self._stream):
            moved = batch.to(self._device, non_blocking=True)
        self._batches.append((moved, self._stream.record_event()))

    def get(self) -> B:
        """The batch that was put first, for use on the current stream, which waits for its copy; IndexError if none."""
        batch, copied = self._batches.popleft()
        if copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied)
            for tensor in batch.tensors():
                tensor.record_stream(stream)  # else its memory could go to the next copy while it is still read here
        return batch

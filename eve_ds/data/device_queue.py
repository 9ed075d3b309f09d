"""Queue that copies batches to a device ahead of their use, while the device computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor


class Movable(Protocol):
    """Batch of any type that can be moved between devices."""

    def tensors(self) -> Iterable[Tensor]:
        """All tensors of the batch."""

    def to(self: B, device: torch.device, non_blocking: bool = False) -> B:
        """Return the same batch with every tensor on `device`."""


B = TypeVar("B", bound=Movable)


class DeviceQueue(Generic[B]):
    """First-in, first-out queue that returns its batches on one device.

    On a CUDA device each copy starts when its batch is put and runs on a separate stream. If the batches are in
    page-locked memory, neither `put` nor `get` blocks the host. On a CPU nothing is copied.

    Args:
        device: device of the returned batches.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._batches: deque[tuple[B, torch.cuda.Event | None]] = deque()

    def put(self, batch: B) -> None:
        """Append a batch, on any device, and start its copy."""
        if self._stream is None:
            self._batches.append((batch.to(self._device), None))
            return
        with torch.cuda.stream(self._stream):
            moved = batch.to(self._device, non_blocking=True)
        self._batches.append((moved, self._stream.record_event()))

    def get(self) -> B:
        """Remove and return the oldest batch; the current stream waits for its copy.

        Raises:
            IndexError: the queue is empty.
        """
        batch, copied = self._batches.popleft()
        if copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied)
            for tensor in batch.tensors():
                tensor.record_stream(stream)  # or its memory could be reused for the next copy while it is still read
        return batch

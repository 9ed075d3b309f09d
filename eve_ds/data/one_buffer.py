"""Send an object with many tensors to another process in one buffer of shared memory.

`torch.multiprocessing` sends each tensor by itself: its memory, a connection and an authentication, which together take
longer than to decode a small image.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes to which the place of each tensor is rounded up, so that loads of whole vectors are aligned."""


class _Place(NamedTuple):
    """Tensor in the buffer."""

    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class OneBuffer:
    """Envelope of an object: its pickle gives the object itself, whose tensors are contiguous views of one buffer.

    Args:
        content: the object; `pickle` must know its parts, and its tensors must be on the CPU.
    """

    def __init__(self, content: Any) -> None:
        self._content = content

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        file = io.BytesIO()
        pickler = _Pickler(file, pickle.HIGHEST_PROTOCOL)
        pickler.dump(self._content)
        return _opened, (file.getvalue(), *_together(pickler.tensors))


class _Pickler(pickle.Pickler):
    """Pickler that puts aside tensors."""

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.tensors: list[Tensor] = []

    def persistent_id(self, item: Any) -> int | None:
        if type(item) is not Tensor:
            return None
        self.tensors.append(item)
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    """Unpickler that puts the tensors back."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self._tensors[number]


def _together(tensors: Iterable[Tensor]) -> tuple[Tensor, list[_Place]]:
    """Copy tensors into one buffer, which the pickler of `torch.multiprocessing` moves to shared memory."""
    places, end = [], 0
    for tensor in tensors:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        end = start + tensor.nbytes
        places.append(_Place(start, end, tensor.dtype, tuple(tensor.shape)))
    buffer = torch.empty(end, dtype=torch.uint8)
    for tensor, place in zip(tensors, places, strict=True):
        _view(buffer, place).copy_(tensor)
    return buffer, places


def _opened(data: bytes, buffer: Tensor, places: list[_Place]) -> Any:
    return _Unpickler(io.BytesIO(data), [_view(buffer, place) for place in places]).load()


def _view(buffer: Tensor, place: _Place) -> Tensor:
    return buffer[place.start : place.end].view(place.dtype).view(place.shape)

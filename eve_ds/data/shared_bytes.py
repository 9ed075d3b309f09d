"""Byte strings in shared memory, so that worker processes get a handle instead of a copy."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray


class SharedBytes:
    """Sequence of byte strings in one uint8 tensor, which the pickler of `torch.multiprocessing` shares.

    Args:
        texts: the byte strings.
    """

    def __init__(self, texts: Iterable[bytes | NDArray[np.uint8]]) -> None:
        parts = [np.frombuffer(text, dtype=np.uint8) for text in texts]
        self._data = torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.uint8), *parts]))
        self._ends = torch.tensor([len(part) for part in parts], dtype=torch.int64).cumsum(0)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> NDArray[np.uint8]:
        """Return a view of one byte string, (n,) uint8."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        start = int(self._ends[number - 1]) if number else 0
        text: NDArray[np.uint8] = self._data[start : int(self._ends[number])].numpy()
        return text

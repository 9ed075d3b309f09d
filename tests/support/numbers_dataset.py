"""A data set whose worker processes find its class by name, which they do not for classes of a test file."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from torch.utils.data import IterableDataset


class Numbers(IterableDataset[tuple[int, int]]):
    """The numbers from 0, each with the id of its worker; it hangs before the number `end`."""

    def __init__(self, end: int = 1 << 30) -> None:
        self.end = end

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for number in range(self.end):
            yield number, os.getpid()
        time.sleep(600)

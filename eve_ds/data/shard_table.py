"""Shards of one source in shared memory, so that worker processes get a handle instead of a copy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from eve_ds.data.shard_index import Varints
from eve_ds.data.shards import Shard


class ShardTable:
    """Sequence of shards without their hashes; the pickler of `torch.multiprocessing` shares its tensors.

    A million samples with layouts take some four megabytes for a process and all of its workers together.

    Args:
        shards: the shards.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._addresses = _Texts(shard.address.encode(errors="surrogateescape") for shard in shards)
        self._groups = _Texts(b"" if shard.groups is None else shard.groups for shard in shards)
        self._sizes = torch.tensor([[shard.num_samples, shard.bytes] for shard in shards], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, number: int) -> Shard:
        samples, size = self._sizes[number].tolist()
        address, groups = self._addresses[number], self._groups[number]
        layout = groups if len(groups) else None
        return Shard(bytes(address).decode(errors="surrogateescape"), samples, size, None, layout)


class _Texts:
    """Byte strings one after another in one uint8 tensor, and the end of each."""

    def __init__(self, texts: Iterable[Varints]) -> None:
        parts = [np.frombuffer(text, dtype=np.uint8) for text in texts]
        self._data: Tensor = torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.uint8), *parts]))
        self._ends = torch.tensor([len(part) for part in parts], dtype=torch.int64).cumsum(0)

    def __getitem__(self, number: int) -> Varints:
        start = int(self._ends[number - 1]) if number else 0
        text: Varints = self._data[start : int(self._ends[number])].numpy()
        return text

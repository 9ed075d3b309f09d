"""Shards of one source, which all worker processes of a rank share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from eve_ds.data.shards import Shard
from eve_ds.data.shared_bytes import SharedBytes


class ShardTable:
    """Sequence of shards in shared memory; a million samples have some four megabytes of layouts.

    Args:
        shards: the shards.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._addresses = SharedBytes(shard.address.encode(errors="surrogateescape") for shard in shards)
        self._hashes = SharedBytes((shard.sha256 or "").encode(errors="surrogatepass") for shard in shards)
        self._groups = SharedBytes(b"" if shard.groups is None else shard.groups for shard in shards)
        self._sizes = torch.tensor([[shard.num_samples, shard.bytes] for shard in shards], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, number: int) -> Shard:
        samples, size = self._sizes[number].tolist()
        address, groups = self._addresses[number], self._groups[number]
        digest = bytes(self._hashes[number]).decode(errors="surrogatepass") or None
        layout = groups if len(groups) else None
        return Shard(bytes(address).decode(errors="surrogateescape"), samples, size, digest, layout)

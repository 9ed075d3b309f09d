"""Open shards of a source: a limited number, those at addresses opened in threads before they are read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from functools import partial

from eve_ds.data.errors import UnusableData
from eve_ds.data.remote.addresses import is_remote
from eve_ds.data.remote.storage import READ_AHEAD, RemoteStorage
from eve_ds.data.shard_file import ShardFile
from eve_ds.data.shard_table import ShardTable
from eve_ds.data.shards import open_shard
from eve_ds.data.tar_headers import HEADER_BYTES

MAX_OPEN_SHARDS = 128
"""Shards that a source keeps open: two per lane, the current one and the next."""


class OpenShards:
    """Shards of one source as one process reads them.

    Args:
        shards: all shards of the source.
        remote: storage of those at addresses.
    """

    def __init__(self, shards: ShardTable, remote: RemoteStorage) -> None:
        self._shards, self._remote = shards, remote
        self._open: OrderedDict[int, ShardFile] = OrderedDict()
        self._opening: dict[int, tuple[Future[ShardFile], list[int]]] = {}
        """Shard -> what its thread will return, and further samples that are wanted of it."""

    def get(self, shard: int) -> ShardFile:
        """Open a shard, unless it is open.

        Raises:
            OSError: the disk failed.
            UnusableData: a server cannot be read, or the shard holds more samples than its index says.
        """
        if shard not in self._open:
            self._open[shard] = self._opened(shard)
        file, listed = self._open[shard], self._shards[shard].num_samples
        if len(file) > listed:  # known when it is opened, or once a sample is read
            raise UnusableData(
                f"shard {file.address} holds {len(file)} samples, its index says {listed}: write the index again with "
                "launcher/prepare.py index, or remove it to have the shards scanned"
            )
        self._open.move_to_end(shard)
        if len(self._open) > MAX_OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        return file

    def known(self, shard: int) -> ShardFile | None:
        """Return a shard if it is open."""
        return self._open.get(shard)

    def images(self, shard: int) -> Iterator[str | None]:
        """Yield the key of the image of each sample of a shard, None for one that is missing; opens the next shards.

        A disk reads single headers fast. A server answers late, so longer spans are read, many at the same time.
        """
        is_far = is_remote(self._shards[shard].address)
        ahead = self._remote.reads_ahead if is_far else 0
        for later in range(shard, min(shard + 1 + ahead, len(self._shards))):
            self._begin(later)
        with suppress(OSError):  # the disk failed
            yield from self.get(shard).images(READ_AHEAD if is_far else HEADER_BYTES, ahead)

    def want(self, shard: int, number: int) -> None:
        """Announce the read of a sample; does nothing for a shard on a disk, which the system reads ahead.

        Raises:
            UnusableData: a package is missing, or see :meth:`get`; a server that fails is an error of the read.
        """
        if shard in self._open:
            self.get(shard).want(number)
        elif shard in self._opening:
            self._opening[shard][1].append(number)
        else:
            self._begin(shard, number)

    def _begin(self, shard: int, number: int | None = None) -> None:
        """Begin to open a shard at an address, of which a sample is wanted first, unless that has begun."""
        address = self._shards[shard].address
        if shard not in self._open and shard not in self._opening and is_remote(address):
            self._opening[shard] = self._remote.submit(address, partial(self._open_for, shard, number)), []

    def _open_for(self, shard: int, number: int | None) -> ShardFile:
        """Open a shard in a thread, and announce the first sample that is wanted of it."""
        file = open_shard(self._shards[shard], self._remote)
        if number is not None:
            file.want(number)
        return file

    def _opened(self, shard: int) -> ShardFile:
        if shard not in self._opening:
            return open_shard(self._shards[shard], self._remote)
        future, numbers = self._opening.pop(shard)
        file = future.result()
        for number in numbers:
            file.want(number)
        return file

    def close(self) -> None:
        """Close all shards; :meth:`get` opens them again."""
        while self._opening:
            self._opening.popitem()[1][0].cancel()
        while self._open:
            self._open.popitem()[1].close()

"""Servers as one process sees them: opens shards at addresses, reads their indices, and finds what a pattern names."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple, TypeVar

from eve_ds import limits
from eve_ds.config import DataConfig
from eve_ds.data.remote.addresses import READERS, is_http, object_name, scheme_of
from eve_ds.data.remote.block_cache import BlockCache, block_bytes
from eve_ds.data.remote.errors import FailedAttempt, MissingObject, RemoteError
from eve_ds.data.remote.interface import RemoteObject, Server, Version, require_same
from eve_ds.data.remote.readers import Readers
from eve_ds.data.remote.retries import SYSTEM_CLOCK, Clock, Retries
from eve_ds.log import get_logger
from eve_ds.printable import without_credentials

READ_AHEAD = 256 * limits.KIB
"""Bytes that a small read fetches without a cache: many headers of a tar stand in them."""
SMALL = 4096
"""Bytes of a small read."""
PARSE_ATTEMPTS = 3
"""Number of times that an object is read which cannot be parsed: without a length in its header a cut answer is no
fault of HTTP."""

T = TypeVar("T")


class _Part(NamedTuple):
    """Part of a block."""

    name: str
    """Name of the block."""
    first: int
    """Place of the block in the object, in bytes."""
    size: int
    """Bytes of the block."""
    start: int
    end: int


class RemoteBytes:
    """Bytes of one object, as a :class:`eve_ds.data.shard_bytes.ShardBytes`; one thread uses it.

    Args:
        address: address of the object.
        opened: the object.
        retries: repetition of failed requests.
        readers: threads that read ahead.
        cache: cache of blocks; None: each read is a request.
        block: bytes of a block.
        content: what else is known of the content, such as its hash; a part of the name of the blocks.
    """

    def __init__(
        self,
        address: str,
        opened: RemoteObject,
        retries: Retries,
        readers: Readers,
        cache: BlockCache | None,
        block: int,
        content: str = "",
    ) -> None:
        self._address, self._object, self._retries = address, opened, retries
        self._readers, self._cache, self._block = readers, cache, block
        self._wanted: dict[tuple[int, int], Future[bytes]] = {}
        self.size = opened.version.size
        self._start, self._buffer = 0, opened.start
        where = f"{object_name(address)}\n{opened.version.size}\n{opened.version.name}\n{content}\n{block}"
        self._name = hashlib.sha256(where.encode("utf-8", "surrogatepass")).hexdigest()[:32]

    def read_at(self, offset: int, size: int) -> bytes:
        """Read `size` bytes from `offset`, fewer at the end of the object.

        Raises:
            RemoteError: the object cannot be read, or is another one than when it was opened.
        """
        size = max(min(size, self.size - offset), 0)
        if (wanted := self._wanted.pop((offset, size), None)) is not None:
            return wanted.result()
        found = self._buffered(offset, size)
        if found is None and self._cache is not None:
            found = self._from_blocks(self._cache, offset, size)
        if found is None and size <= SMALL:
            self._start, self._buffer = offset, self._fetch(offset, min(READ_AHEAD, self.size - offset))
            found = self._buffer[:size]
        return self._fetch(offset, size) if found is None else found

    def want(self, offset: int, size: int) -> None:
        """Begin to read `size` bytes from `offset` in a thread, for a later :meth:`read_at` of the same bytes."""
        size = max(min(size, self.size - offset), 0)
        if (offset, size) not in self._wanted and self._buffered(offset, size) is None:
            self._wanted[offset, size] = self._readers.submit(partial(self._get, offset, size))

    def _get(self, offset: int, size: int) -> bytes:
        found = None if self._cache is None else self._from_blocks(self._cache, offset, size)
        return self._fetch(offset, size) if found is None else found

    def _buffered(self, offset: int, size: int) -> bytes | None:
        first = offset - self._start
        inside = size == 0 or 0 <= first <= first + size <= len(self._buffer)
        return self._buffer[first : first + size] if inside else None

    def _from_blocks(self, cache: BlockCache, offset: int, size: int) -> bytes | None:
        found = []
        for part in self._parts(offset, size):
            fetch = partial(self._fetch, part.first, part.size)
            data = cache.read(part.name, part.start, part.end, part.size, fetch)
            if data is None:
                return None
            found.append(data)
        return b"".join(found)

    def _parts(self, offset: int, size: int) -> Iterator[_Part]:
        """Parts of the blocks in which a range lies."""
        for number in range(offset // self._block, (offset + size - 1) // self._block + 1):
            first = number * self._block
            length = min(self._block, self.size - first)
            start, end = max(offset - first, 0), min(offset + size - first, length)
            yield _Part(f"{self._name}/{number}", first, length, start, end)

    def _fetch(self, offset: int, size: int) -> bytes:
        return self._retries.call(self._address, lambda end: self._object.read(offset, size, end))

    def reread(self, offset: int, size: int) -> bytes:
        """Read from the server what :meth:`read_at` read; blocks with other bytes are removed from the cache."""
        size = max(min(size, self.size - offset), 0)
        self._start, self._buffer = 0, b""
        data = self._fetch(offset, size) if size else b""
        if self._cache is not None:
            for part in self._parts(offset, size):
                begin = part.first + part.start - offset
                self._cache.remove_other(part.name, part.start, data[begin : begin + part.end - part.start], part.size)
        return data

    def close(self) -> None:
        """Forget the bytes that were read ahead; the connections belong to the storage."""
        self._buffer = b""
        while self._wanted:
            self._wanted.popitem()[1].cancel()


class RemoteStorage:
    """Servers of one source. It can be copied to another process, which makes its own connections.

    Args:
        config: section `data`, for timeouts, retries and cache.
        clock: clock of deadlines and waits.
    """

    def __init__(self, config: DataConfig, clock: Clock = SYSTEM_CLOCK) -> None:
        self._config, self._clock = config, clock
        self._versions: dict[str, Version] = {}
        self._has_warned = False
        self.reads_ahead = config.remote.reads_ahead
        """Number of reads at the same time."""
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._servers: dict[str, Server] = {}
        self._cache: BlockCache | None = None
        self._retries = Retries(self._config.remote, self._clock)
        self._readers = Readers(max(self._config.remote.reads_ahead, 1))

    def __getstate__(self) -> dict[str, Any]:
        names = ("_config", "_clock", "_versions", "_has_warned", "reads_ahead")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def open(self, address: str, content: str = "") -> RemoteBytes:
        """Open an object.

        Args:
            address: its address.
            content: its hash, if an index has it: blocks of an earlier content are then not used.

        Raises:
            RemoteError: it cannot be read, or it is another one than when it was opened before; or a package is
                missing, or the folder of the cache cannot be used.
        """
        server = self._server(address)
        opened = self._retries.call(address, lambda end: server.open(address, end))
        before = self._versions.get(address, opened.version)
        self._versions[address] = opened.version = require_same(address, before, opened.version)
        cache, block = self._blocks(), block_bytes(self._config.cache_bytes)
        if cache is not None and not opened.version.name and not content:
            self._warn_of_no_version(address)
            cache = None
        return RemoteBytes(address, opened, self._retries, self._readers, cache, block, content)

    def _warn_of_no_version(self, address: str) -> None:
        if not self._has_warned:
            get_logger().warning(
                "%s has no hash in an index.json and its server sends neither ETag nor Last-Modified: data.cache_dir "
                "does not store it, as it could not be told from another version; write an index with "
                "launcher/prepare.py index",
                without_credentials(address),
            )
        self._has_warned = True

    def submit(self, address: str, call: Callable[[], T]) -> Future[T]:
        """Call a function that opens an object in one of the threads that read ahead.

        Raises:
            RemoteError: a package is missing, or the folder of the cache cannot be used.
        """
        self._server(address), self._blocks()  # connected here, not by several threads at a time
        return self._readers.submit(call)

    def read_small(self, address: str, most: int, parse: Callable[[bytes], T]) -> T | None:
        """Read a small object as a whole, such as an index; None if there is none.

        Args:
            address: its address.
            most: largest number of bytes.
            parse: function of the bytes that raises ValueError for those of a cut answer, which is repeated; it decides
                at the last of `PARSE_ATTEMPTS` attempts.

        Raises:
            RefusedObject: the server refuses the object with these credentials.
            RemoteError: it cannot be read, or has more than `most` bytes.
        """
        server, attempts = self._server(address), itertools.count(1)

        def request(end: float) -> T:
            document = server.read_whole(address, most)
            try:
                return parse(document)
            except ValueError as error:
                if isinstance(error, RemoteError) or next(attempts) == PARSE_ATTEMPTS:
                    raise
                raise FailedAttempt("not the whole object") from None

        try:
            return self._retries.call(address, request)
        except MissingObject:
            return None

    def matching(self, pattern: str) -> list[str]:
        """Addresses that match a glob pattern, or have that very name, sorted; that of a folder ends in a slash.

        Raises:
            RemoteError: the store cannot be read, or it is an HTTP server, which has no lists of files.
        """
        server = self._server(pattern)
        return self._retries.call(pattern, lambda _: server.matching(pattern))

    def _server(self, address: str) -> Server:
        """Servers of the scheme of an address, connected by this process."""
        if self._process != os.getpid():
            self._forget()
        scheme = "https" if is_http(address) else str(scheme_of(address))
        if scheme not in self._servers:
            self._servers[scheme] = self._connect(scheme)
        return self._servers[scheme]

    def _connect(self, scheme: str) -> Server:
        timeout, connections = self._config.remote.timeout_seconds, self._config.remote.reads_ahead + 1
        try:
            importlib.import_module(READERS[scheme].module)
            if scheme == "https":
                from eve_ds.data.remote.http_objects import HttpServers

                return HttpServers(timeout, self._clock, connections)
            from eve_ds.data.remote.stored_objects import ObjectStore

            return ObjectStore(scheme, timeout, connections)
        except ImportError:
            raise RemoteError(
                f"{scheme}:// needs a package that is not installed: pip install '{READERS[scheme].requirement}'"
            ) from None

    def _blocks(self) -> BlockCache | None:
        if self._cache is None and self._config.cache_dir is not None:
            self._cache = BlockCache(self._config.cache_dir, self._config.cache_bytes, self._clock)
        return self._cache

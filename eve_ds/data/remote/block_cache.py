"""Cache of blocks on the local disk: bounded, shared by all processes of a machine, and never needed.

    DIR/eve_ds_blocks/<object>/<number>    one block and its CRC-32
    DIR/eve_ds_blocks/used                 bytes of all blocks, at least; counted before a block appears
    DIR/eve_ds_blocks/locks/<number>       one process at a time fetches a block, unless it takes seconds

A block appears whole, by a rename. The time of its file is that of its last use. A process that is killed leaves a
part of a block at most, which is counted and deleted like an old block. Nothing outside `eve_ds_blocks` is deleted.
"""

from __future__ import annotations

import itertools
import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from eve_ds import limits
from eve_ds.data.remote.cache_locks import CacheLocks
from eve_ds.data.remote.errors import RemoteError
from eve_ds.data.remote.retries import Clock
from eve_ds.log import get_logger
from eve_ds.storage import cause, is_disk_error

OWN_FOLDER = "eve_ds_blocks"
"""Folder in `data.cache_dir` in which the cache deletes what it needs to."""
MOST_BLOCK_BYTES, LEAST_BLOCK_BYTES = 4 * limits.MIB, 64 * limits.KIB
"""Bytes of a block: a request for the larger one takes hardly longer than one for a sample."""
ENOUGH_BLOCKS = 1024
"""Blocks for which a cache has room, as samples of many shards are read in turn: a smaller cache has smaller ones."""
KEPT = 0.9
"""Share of the limit that is left when the cache is full."""
TOUCH_SECONDS = 60.0
"""Precision of the time of the last use; each correction is a write."""
PAUSE_SECONDS = 60.0
"""Seconds without new blocks after the disk took none; twice as many after each further time, up to an hour."""
LOCKS = 256
MOST_CHECKED = 100_000
"""Blocks whose CRC is remembered as right: some ten megabytes."""
_CRC = 4


def block_bytes(most: int) -> int:
    """Bytes of the blocks of a cache of at most `most` bytes, a power of two."""
    return min(max(2 ** ((most // ENOUGH_BLOCKS).bit_length() - 1), LEAST_BLOCK_BYTES), MOST_BLOCK_BYTES)


class _Stored(NamedTuple):
    used: float
    """Time of the last use, in seconds since 1970."""
    size: int
    path: str


class BlockCache:
    """Cache of one process in a folder that others may use at the same time.

    Args:
        folder: folder on a local disk; created.
        most: bytes that the blocks may take.
        clock: clock of the pause after an error of the disk.

    Raises:
        RemoteError: the folder cannot be created.
    """

    def __init__(self, folder: Path, most: int, clock: Clock) -> None:
        self._folder, self._most, self._clock = folder / OWN_FOLDER, most, clock
        self._locks = CacheLocks(clock)
        self._checked: dict[str, int] = {}
        """Block -> inode of the file whose CRC was right."""
        self._names = itertools.count()
        self._closed_until, self._pause_seconds = 0.0, PAUSE_SECONDS
        try:
            (self._folder / "locks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if not is_disk_error(error):
                raise RemoteError(
                    f"data.cache_dir ({folder}) cannot be used: {cause(error)}; name a folder on a local disk"
                ) from None
            self._pause(error)

    def read(self, name: str, start: int, end: int, size: int, fetch: Callable[[], bytes]) -> bytes | None:
        """Bytes `start` to `end` of a block; fetched as a whole if it is not stored.

        Args:
            name: name of the block, `<object>/<number>`.
            start: first byte in the block.
            end: byte after the last one.
            size: bytes of the block.
            fetch: function that gets the whole block from the server.

        Returns:
            The bytes; None if the block is not stored and the disk takes none at present.
        """
        found = self._stored(name, start, end, size)
        if found is not None or self._clock.now() < self._closed_until:
            return found
        with self._alone(name):
            found = self._stored(name, start, end, size)
            if found is not None:
                return found
            data = fetch()
            self._store(name, data)
        return data[start:end]

    def remove_other(self, name: str, start: int, data: bytes, size: int) -> None:
        """Remove a block of `size` bytes that has other bytes at `start` than `data`."""
        stored = self._stored(name, start, start + len(data), size)
        if stored is not None and stored != data:
            with suppress(OSError):
                os.unlink(self._folder / name)

    def _stored(self, name: str, start: int, end: int, size: int) -> bytes | None:
        """Bytes of a block that is stored and whole."""
        try:
            with open(self._folder / name, "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                if status.st_size != size + _CRC or not self._is_right(name, file.fileno(), status.st_ino, size):
                    return None
                with suppress(OSError):
                    self._touch(file.fileno(), status.st_mtime)
                return os.pread(file.fileno(), end - start, start)
        except OSError:  # not there, or on a broken disk
            return None

    def _is_right(self, name: str, descriptor: int, inode: int, size: int) -> bool:
        """Whether the CRC is right; computed at the first use by this process, as a machine may have lost power."""
        if self._checked.get(name) != inode:
            data = os.pread(descriptor, size + _CRC, 0)
            if _crc(data[:size]) != data[size:]:
                return False
            if len(self._checked) >= MOST_CHECKED:
                self._checked.clear()
            self._checked[name] = inode
        return True

    def _touch(self, descriptor: int, last: float) -> None:
        if time.time() - last > TOUCH_SECONDS:
            os.utime(descriptor)

    def _store(self, name: str, data: bytes) -> None:
        path = self._folder / name
        aside = path.with_name(f".{path.name}.{os.getpid()}.{next(self._names)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not self._reserve(len(data) + _CRC):
                return
            try:
                aside.write_bytes(data + _crc(data))
                os.replace(aside, path)
            except BaseException:
                aside.unlink(missing_ok=True)
                raise
        except OSError as error:
            self._pause(error)

    def _pause(self, error: OSError) -> None:
        """Store no blocks for a while; those that are stored are still read."""
        get_logger().warning(
            "data.cache_dir (%s) takes no block: %s; reading without it for %d seconds",
            self._folder.parent,
            cause(error),
            self._pause_seconds,
        )
        self._closed_until = self._clock.now() + self._pause_seconds
        self._pause_seconds = min(2 * self._pause_seconds, 3600.0)

    def _reserve(self, size: int) -> bool:
        """Count the bytes of a new block, after removing old ones if there are too many; False: do not store it.

        A block is not stored if it can never fit, or if another process does not finish its counting.
        """
        if size > self._most:
            return False
        with self._locks.taken(self._folder / "used") as descriptor:
            if descriptor is None:
                return False
            text = os.pread(descriptor, 32, 0)
            used = int(text) if text.isdigit() else None
            if used is None or used + size > self._most:
                used = self._remove_old(size)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, b"%d" % (used + size), 0)
            return True

    def _remove_old(self, size: int) -> int:
        """Remove the blocks that were not used for longest, until `size` more bytes fit; the bytes that are left."""
        stored = sorted(self._all())
        used = sum(item.size for item in stored)
        most = self._most if used + size <= self._most else min(int(self._most * KEPT), self._most - size)
        for item in stored:
            if used <= most:
                break
            with suppress(FileNotFoundError):
                os.unlink(item.path)
            used -= item.size
        return used

    def _all(self) -> Iterator[_Stored]:
        for folder in os.scandir(self._folder):
            if folder.is_dir() and folder.name != "locks":
                for file in os.scandir(folder.path):
                    with suppress(FileNotFoundError):
                        status = file.stat()
                        yield _Stored(status.st_mtime, status.st_size, file.path)

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Keep others from fetching the same block at the same time; without the lock they may, which costs time."""
        path = self._folder / "locks" / str(zlib.crc32(name.encode()) % LOCKS)
        with ExitStack() as stack:
            with suppress(OSError):
                stack.enter_context(self._locks.taken(path))
            yield


def _crc(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(_CRC, "little")

"""Bytes of a shard at an offset: the interface of every storage, and files of this machine."""

from __future__ import annotations

import os
from typing import Protocol


class ShardBytes(Protocol):
    """One stored shard, open for reading."""

    size: int
    """Bytes of the shard."""

    def read_at(self, offset: int, size: int) -> bytes:
        """Read `size` bytes from `offset`; fewer at the end of the shard.

        Raises:
            OSError: the storage failed.
        """

    def reread(self, offset: int, size: int) -> bytes:
        """Read again what :meth:`read_at` read and what seems to be damaged, from its server and past all caches."""

    def want(self, offset: int, size: int) -> None:
        """Announce a :meth:`read_at` of the same bytes, which may be read in the background until then."""

    def close(self) -> None:
        """End the access."""


class FileBytes:
    """Shard in a file.

    Args:
        path: path of the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115, closed in close()
        self.size = os.fstat(self._file.fileno()).st_size

    def read_at(self, offset: int, size: int) -> bytes:
        """Read `size` bytes from `offset`; fewer at the end of the file."""
        return os.pread(self._file.fileno(), size, offset)

    def reread(self, offset: int, size: int) -> bytes:
        """Read as :meth:`read_at` does."""
        return self.read_at(offset, size)

    def want(self, offset: int, size: int) -> None:
        """Do nothing: the system reads files ahead."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def stored_size(address: str) -> int:
    """Bytes of a shard, without opening it."""
    return os.stat(address).st_size

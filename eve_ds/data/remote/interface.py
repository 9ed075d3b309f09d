"""What every kind of server offers: objects with a version, by which a replaced one is found, read in ranges."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from eve_ds.data.remote.errors import RemoteError
from eve_ds.printable import without_credentials


class Version(NamedTuple):
    """What changes if an object is replaced."""

    size: int
    """Bytes."""
    tag: str = ""
    """`ETag` of the server, or what takes its place in a store; empty if an answer has none."""
    modified: str = ""
    """`Last-Modified` of the server; empty if an answer has none."""

    def __str__(self) -> str:
        return f"{self.size:,} bytes, {self.tag or self.modified or 'no ETag'}"

    @property
    def name(self) -> str:
        """What tells versions of one size apart; empty if the server sends neither."""
        return self.tag or self.modified

    def is_other(self, before: Version) -> bool:
        """Whether an answer is of another object, by the better mark that both answers have.

        Machines behind one address may differ in the headers that they send.
        """
        marks = [pair for pair in zip(self[1:], before[1:], strict=True) if all(pair)]
        return self.size != before.size or (bool(marks) and marks[0][0] != marks[0][1])


class RemoteObject(Protocol):
    """One object of a server; its constructor learns the version. Each method makes one request."""

    version: Version
    start: bytes
    """First bytes, if the constructor has read some."""

    def read(self, offset: int, size: int, end: float) -> bytes:
        """Read `size` bytes, which must lie in the object, until the time `end` on the clock.

        Raises:
            FailedAttempt: the request may be repeated.
            RemoteError: the object was replaced or is gone, or the server cannot read ranges of it.
        """


class Server(Protocol):
    """Servers of one scheme, as one process uses them. Each method makes one request, or a few without repetition.

    All raise FailedAttempt if the request may be repeated, and RemoteError if not.
    """

    def open(self, address: str, end: float) -> RemoteObject:
        """Open an object until the time `end` on the clock."""

    def read_whole(self, address: str, most: int) -> bytes:
        """Read a small object, such as an index; RemoteError if it has more than `most` bytes."""

    def matching(self, pattern: str) -> list[str]:
        """Addresses that match a glob pattern, or have that very name, sorted; that of a folder ends in a slash."""


def require_same(address: str, before: Version, now: Version) -> Version:
    """Version with the marks of both answers; raises :class:`RemoteError` if they are of two objects."""
    if now.is_other(before):
        raise RemoteError(
            f"{without_credentials(address)} was replaced while it was read ({before}; now {now}): restore it and "
            "rerun the same command, or start another run"
        )
    return Version(before.size, before.tag or now.tag, before.modified or now.modified)

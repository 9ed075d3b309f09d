"""Errors of shards at addresses: a failed attempt, which is repeated, and an error that ends the run."""

from __future__ import annotations

from eve_ds.data.errors import UnusableData
from eve_ds.printable import without_credentials


class RemoteError(UnusableData):
    """A shard at an address cannot be read; the message names the address, without credentials, and the cause.

    It ends the run: a sample that is left out while a server is down would make the run another one.
    """


class MissingObject(RemoteError):
    """The server knows no such object."""


class RefusedObject(RemoteError):
    """The server refuses an object with these credentials.

    Stores also answer so if an object is missing, but the credentials do not permit to list others, or if a signature
    in the address is that of another object.
    """


class WrongContent(RemoteError):
    """The server sends something else in place of an object, such as the page of a login."""


class FailedAttempt(Exception):
    """A request failed in a way that may pass.

    Args:
        reason: short text without the address, such as "HTTP 503".
        wait: seconds to wait that the server asked for.
    """

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.wait = reason, wait


def wrong_content(address: str, found: str) -> str:
    """Message that a server sent something else in place of an object, such as the page of a login."""
    return (
        f"{without_credentials(address)} is {found}: check the address, and whether the server wants a login or a "
        "signature"
    )

"""Errors of shards at addresses: a failed attempt, which is repeated, and an error that ends the run."""

from __future__ import annotations

from eve_ds.data.errors import UnusableData


class RemoteError(UnusableData):
    """A shard at an address cannot be read; the message names the address, without credentials, and the cause.

    It ends the run: a sample that is left out while a server is down would make the run another one.
    """


class MissingObject(RemoteError):
    """The server knows no such object, or shows it to nobody without the right credentials."""


class FailedAttempt(Exception):
    """A request failed in a way that may pass.

    Args:
        reason: short text without the address, such as "HTTP 503".
        wait: seconds to wait that the server asked for.
    """

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.wait = reason, wait
